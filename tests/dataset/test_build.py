"""Documents to a dataset directory: nothing lost, nothing twice, the same bytes whatever the order."""

import hashlib
import json
import logging
import random

import numpy as np
import pytest

from ctllm_jax.config.data import BuildConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.dataset import build as build_module
from ctllm_jax.dataset import shuffle
from ctllm_jax.dataset.build import build, build_from_files
from ctllm_jax.dataset.reader import Dataset
from ctllm_jax.dataset.text import Document
from ctllm_jax.dataset.verify import verify


class ByteTokenizer:
    """Every byte is its own id."""

    vocab_size, eos_id = 257, 256

    def __init__(self, path):
        path.write_bytes(b"bytes")
        self.path, self.sha256 = path, hashlib.sha256(b"bytes").hexdigest()

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]


@pytest.fixture
def tokenizer(tmp_path):
    """Bytes as ids."""
    return ByteTokenizer(tmp_path / "byte.model")


@pytest.fixture
def texts():
    """150 different documents, some longer than a record."""
    draw = random.Random(1)
    return [f"{index} " + "".join(draw.choices("abc你好\n ", k=draw.randint(1, 200))) for index in range(150)]


def options(output, **changes):
    """Records of 64 tokens."""
    return BuildConfig(**{"input": ["-"], "output": str(output), "tokenizer": "byte.model", "record_tokens": 64,
                            "validation_fraction": 0.1, **changes})


def made(texts, output, tokenizer, **changes):
    """(dataset, summary) of these texts."""
    documents = [Document(text, None, 1) for text in texts]
    summary = build(lambda quarantine: iter(documents), options(output, **changes), tokenizer, expected_bytes=10**4)
    return Dataset(output), summary


def documents_of(dataset, split):
    """The texts of a split, shard by shard, in order."""
    found = []
    for reader in dataset.split(split).shards:
        window = reader.window(0, reader.shard.tokens)
        found.append([bytes(part[:-1].tolist()).decode() for part in np.split(window.tokens, window.ends[:-1])])
    return found


def files_of(directory):
    """Every file and its bytes."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_every_document_is_there_once(texts, tmp_path, tokenizer):
    dataset, summary = made([*texts, "", " \n", *texts[:20]], tmp_path / "out", tokenizer, shards=3)
    train, held_out = documents_of(dataset, "train"), documents_of(dataset, "validation")
    assert sorted(sum(train + held_out, [])) == sorted(texts)
    assert (summary.read, summary.duplicates, summary.empty, summary.bad) == (172, 20, 2, 0)
    assert 5 < len(sum(held_out, [])) < 30
    assert sum(train, []) != sorted(sum(train, [])) and len(train) == 3
    tokens = [shard.tokens for shard in dataset.manifest.splits["train"].shards]
    assert max(tokens) - min(tokens) < 1000
    for name, documents in (("train", train), ("validation", held_out)):
        split = dataset.manifest.splits[name]
        assert split.total("documents") == len(sum(documents, []))
        assert split.total("text_bytes") == sum(len(text.encode()) for text in sum(documents, []))
        assert split.total("tokens") == split.total("text_bytes") + split.total("documents")
    assert verify(tmp_path / "out") == []


def test_the_same_texts_give_the_same_bytes_in_any_order_and_number_of_buckets(texts, tmp_path, tokenizer, monkeypatch):
    made(texts, tmp_path / "one", tokenizer, shards=2)
    made(texts, tmp_path / "again", tokenizer, shards=2)
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 1000)
    seen = []
    monkeypatch.setattr(build_module, "read_bucket", lambda bucket, **rest: seen.append(bucket) or
                        shuffle.read_bucket(bucket, **rest))
    made([*reversed(texts), texts[0]], tmp_path / "other", tokenizer, shards=2)
    assert len(seen) == 10
    assert files_of(tmp_path / "one") == files_of(tmp_path / "again") == files_of(tmp_path / "other")


def test_the_seed_moves_documents_but_not_between_splits(texts, tmp_path, tokenizer):
    one, _ = made(texts, tmp_path / "one", tokenizer)
    other, _ = made(texts, tmp_path / "other", tokenizer, seed=7)
    for split in ("train", "validation"):
        before, after = documents_of(one, split)[0], documents_of(other, split)[0]
        assert before != after and sorted(before) == sorted(after)


def test_a_grown_corpus_holds_the_same_documents_out(texts, tmp_path, tokenizer):
    one, _ = made(texts[:100], tmp_path / "one", tokenizer)
    other, _ = made(texts, tmp_path / "other", tokenizer)
    assert set(documents_of(one, "validation")[0]) <= set(documents_of(other, "validation")[0])


def test_copies_are_kept_on_request_and_fall_into_one_split(texts, tmp_path, tokenizer):
    dataset, summary = made(texts * 2, tmp_path / "out", tokenizer, deduplicate=False)
    assert summary.duplicates == 0
    held_out = documents_of(dataset, "validation")[0]
    assert sorted(documents_of(dataset, "train")[0] + held_out) == sorted(texts * 2)
    assert all(held_out.count(text) == 2 for text in held_out)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_documents_still_give_both_splits(texts, tmp_path, tokenizer, count):
    dataset, _ = made(texts[:count], tmp_path / "out", tokenizer, validation_fraction=0.0001)
    assert len(documents_of(dataset, "validation")[0]) == 1
    assert len(documents_of(dataset, "train")[0]) == count - 1
    dataset, _ = made(texts[:count], tmp_path / "most", tokenizer, validation_fraction=0.9999)
    assert len(documents_of(dataset, "train")[0]) == 1


def test_one_document_is_trained_on(texts, tmp_path, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        dataset, _ = made(texts[:1] * 3, tmp_path / "out", tokenizer)
    assert list(dataset.manifest.splits) == ["train"]
    assert "leaves nothing to hold out" in caplog.text


def test_shards_without_a_document_are_not_made(tmp_path, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        dataset, _ = made(["a", "b", "c" * 5000], tmp_path / "out", tokenizer, shards=8, validation_fraction=0)
    shards = dataset.manifest.splits["train"].shards
    assert 1 < len(shards) <= 3 and all(f"-of-{len(shards):05d}" in shard.file for shard in shards)
    assert f"3 documents fill {len(shards)} of 8 shards" in caplog.text
    assert verify(tmp_path / "out") == []


def test_ids_of_a_large_vocabulary_take_four_bytes(tmp_path, tokenizer):
    dataset, _ = made(["a", "b"], tmp_path / "out", tokenizer, eod_id=125_696, validation_fraction=0)
    assert dataset.manifest.dtype == "uint32"
    assert sorted(dataset.split("train").shards[0].window(0, 4).tokens.tolist()) == [97, 98, 125_696, 125_696]


def test_what_was_put_aside_lies_in_the_directory(texts, tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\nbad\n{"text": "two"}\n')
    summary = build_from_files(options(tmp_path / "out", input=[str(path)], max_bad=1), tokenizer)
    assert (summary.read, summary.bad) == (3, 1)
    assert json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())["line"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "byte.model", "out"]
    with pytest.raises(UserError, match=rf"{path}:2: malformed JSON"):
        build_from_files(options(tmp_path / "no", input=[str(path)]), tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "byte.model", "no.quarantine.jsonl", "out"]


def test_nothing_to_prepare_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="input=- holds no text: 2 empty documents, 0 bad records"):
        made(["", "  "], tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_left_alone(texts, tmp_path, tokenizer):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already: remove it, or write elsewhere"):
        made(texts, tmp_path / "out", tokenizer)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_tokenizer_without_an_end_needs_eod_id(texts, tmp_path, tokenizer):
    tokenizer.eos_id = None
    with pytest.raises(UserError, match=r"eod_id must be given: byte.model has no EOS"):
        made(texts, tmp_path / "out", tokenizer)


def test_progress_ends_at_the_total(texts, tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    seen = {}
    build_from_files(options(tmp_path / "out", input=[str(path)]), tokenizer,
                     progress=lambda stage, done, total: seen.update({stage: (done, total)}))
    size = sum(len(text.encode()) for text in texts)
    assert seen == {"read": (path.stat().st_size,) * 2, "tokenize": (size, size)}
