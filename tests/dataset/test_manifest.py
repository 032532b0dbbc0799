"""What a manifest says, and that a wrong one is told what is wrong with it."""

import json

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.dataset.manifest import read_manifest


def test_a_manifest_says_what_was_written(directory, documents):
    manifest = read_manifest(directory)
    train = manifest.splits["train"]
    assert (manifest.name, manifest.record_tokens, manifest.dtype, manifest.eod_id) == ("numbers", 16, "uint16", 7)
    assert train.total("documents") == 8
    assert train.total("tokens") == sum(len(ids) + 1 for stream in documents["train"] for ids in stream)
    assert train.total("text_bytes") == sum(2 * len(ids) for stream in documents["train"] for ids in stream)
    assert [shard.records for shard in train.shards] == [5, 3]
    assert read_manifest(directory).to_json() == (directory / "manifest.json").read_text()


def more_records(values, more):
    """The first shard, and its split, state more records."""
    train = values["splits"]["train"]
    train["records"] += more
    train["shards"][0]["records"] += more


@pytest.mark.parametrize("change, message", [
    (lambda values: values.update(format=2), "format=2, this version reads format 1"),
    (lambda values: values.pop("eod_id"), "eod_id is missing"),
    (lambda values: values["splits"]["train"].update(tokens=1), "split train states tokens=1, its shards sum to 99"),
    (lambda values: more_records(values, 4), "states 9 records for 66 tokens, which make 5 of 16"),
    (lambda values: values["splits"]["train"]["shards"][0].pop("sha256"), "is damaged: .*sha256"),
    (lambda values: values.update(dtype="int8"), "dtype='int8' must be uint16 or uint32"),
    (lambda values: values.update(eod_id=70_000), "eod_id=70000 must be an id that uint16 can hold"),
    (lambda values: values.update(record_tokens=0), "record_tokens=0 must be a positive integer"),
    (lambda values: values.update(splits=[]), "is damaged"),
])
def test_a_wrong_manifest_is_told_what_is_wrong(directory, change, message):
    path = directory / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as refused:
        read_manifest(directory)
    assert str(path) in str(refused.value)


def test_half_a_manifest_is_not_json(directory):
    path = directory / "manifest.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match="manifest.json is not JSON"):
        read_manifest(directory)
