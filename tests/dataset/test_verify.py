"""Damage of every kind is found and named; a whole dataset passes."""

import hashlib
import json
import re

import numpy as np
import pytest

from ctllm_jax.dataset.verify import verify
from ctllm_jax.dataset.writer import ShardWriter

from .conftest import EOD, R

SHARD = "numbers-train.array_record-00000-of-00002"


def truncate(directory):
    path = directory / SHARD
    path.write_bytes(path.read_bytes()[:-9])


def flip(directory):
    path = directory / SHARD
    data = bytearray(path.read_bytes())
    data[300] ^= 4
    path.write_bytes(data)


def flip_padding(directory):
    path = directory / SHARD
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def restate(directory, **values):
    """Other numbers for the first shard in the manifest."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    shard = manifest["splits"]["train"]["shards"][0]
    for name, value in values.items():
        if name in manifest["splits"]["train"]:
            manifest["splits"]["train"][name] += value - shard[name]
        shard[name] = value
    path.write_text(json.dumps(manifest))


def other_stream(directory, stream):
    """Another stream in the first shard, with size and hash as the manifest says."""
    writer = ShardWriter(directory / SHARD, record_tokens=R, dtype="uint16", eod_id=EOD)
    for ids in stream:
        writer.add(np.asarray(ids, np.uint16), text_bytes=0)
    shard = writer.close()
    restate(directory, size=shard.size, sha256=shard.sha256)


@pytest.mark.parametrize("damage, messages", [
    (truncate, [rf"{SHARD}: truncated: \d+ bytes, the manifest says \d+"]),
    (flip, [rf"{SHARD}: its sha256 is not the manifest's", rf"{SHARD}: record \d cannot be read"]),
    (flip_padding, [rf"{SHARD}: its sha256 is not the manifest's"]),
    (lambda directory: (directory / SHARD).unlink(), [rf"{SHARD}: missing"]),
    (lambda directory: (directory / SHARD).write_bytes(b""),
     [rf"{SHARD}: truncated: 0 bytes", rf"{SHARD}: holds 0 records, the manifest says 5"]),
    (lambda directory: restate(directory, documents=99), [r"6 documents can be read, the manifest says 99"]),
    (lambda directory: restate(directory, tokens=65), [r"66 tokens can be read, the manifest says 65"]),
    (lambda directory: other_stream(directory, [[8] * 64, []]), [r"2 documents can be read, the manifest says 6"]),
    (lambda directory: other_stream(directory, [[8] * 61, [], [], [], [100]]), [r"id 100 is above the tokenizer's 99"]),
    (lambda directory: (directory / "tokenizer.model").write_text("x"), [r"tokenizer.model: its sha256 is not"]),
    (lambda directory: (directory / "tokenizer.model").unlink(), [r"tokenizer.model: missing"]),
    (lambda directory: (directory / "features.json").unlink(), [r"TFDS cannot read its metadata"]),
    (lambda directory: (directory / "dataset_info.json").write_text("{}"), [r"TFDS cannot read its metadata"]),
    (lambda directory: (directory / "numbers-train.array_record-00007-of-00009").touch(), ["does not name it"]),
    (lambda directory: (directory / "manifest.json").unlink(), ["it has no manifest.json"]),
])
def test_damage_is_named(directory, damage, messages):
    damage(directory)
    problems = "\n".join(verify(directory))
    for message in messages:
        assert re.search(message, problems), problems


def test_a_document_that_does_not_end_in_eod_is_named(directory):
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('"eod_id": 7', '"eod_id": 6'))
    assert any("a document does not end in EOD (6)" in problem for problem in verify(directory))


def test_a_whole_dataset_passes(directory):
    seen = []
    assert verify(directory, progress=lambda done, total: seen.append((done, total))) == []
    sizes = sum(path.stat().st_size for path in directory.glob("*array_record*"))
    assert seen[-1] == (sizes, sizes)


def test_the_same_documents_give_the_same_bytes(directory, documents):
    before = hashlib.sha256((directory / SHARD).read_bytes()).hexdigest()
    other_stream(directory, documents["train"][0])
    assert hashlib.sha256((directory / SHARD).read_bytes()).hexdigest() == before
    assert verify(directory) == []
