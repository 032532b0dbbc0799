"""A dataset directory made of numbers, with a file that stands for its tokenizer."""

import hashlib

import numpy as np
import pytest

from ctllm_jax.dataset.writer import ShardWriter, finish, shard_name

R, EOD = 16, 7


@pytest.fixture
def documents():
    """Two training streams and a held-out one, as lists of ids."""
    draw = np.random.default_rng(0)
    return {"train": [[draw.integers(8, 90, size=size).tolist() for size in sizes]
                      for sizes in ([3, 40, 0, 15, 1, 1], [5, 26])],
            "validation": [[[11, 12]]]}


@pytest.fixture
def directory(tmp_path, documents):
    """The dataset directory of `documents`: R = 16, EOD = 7, 100 ids."""
    directory = tmp_path / "numbers"
    directory.mkdir()
    splits = {}
    for split, streams in documents.items():
        splits[split] = []
        for index, stream in enumerate(streams):
            writer = ShardWriter(directory / shard_name("numbers", split, index, len(streams)), record_tokens=R,
                                 dtype="uint16", eod_id=EOD)
            for ids in stream:
                writer.add(np.asarray(ids, np.uint16), text_bytes=2 * len(ids))
            splits[split].append(writer.close())
    tokenizer = tmp_path / "some.model"
    tokenizer.write_bytes(b"stands for a tokenizer")
    finish(directory, name="numbers", record_tokens=R, dtype="uint16", eod_id=EOD, tokenizer=tokenizer,
           tokenizer_sha256=hashlib.sha256(tokenizer.read_bytes()).hexdigest(), vocab_size=100, config_sha256="c",
           splits=splits)
    return directory
