"""One record of a shard: R tokens of its stream, and the document ends in them. Uses TFDS features without
TensorFlow."""

from __future__ import annotations

import threading
from functools import cache
from typing import NamedTuple

import numpy as np


class Record(NamedTuple):
    """R tokens of a stream.

    tokens: [R] uint16 or uint32, of which the first `num_tokens` count; ends: int32, offsets one past each EOD.
    """

    tokens: np.ndarray
    num_tokens: int
    ends: np.ndarray


@cache
def features(record_tokens: int, dtype: str):
    """The TFDS FeaturesDict of a record. Arrays are stored as bytes, which takes 45 us to write or read 4,096 ids
    instead of 450."""
    import tensorflow_datasets as tfds

    stored = tfds.features.Encoding.BYTES
    return tfds.features.FeaturesDict({
        "tokens": tfds.features.Tensor(shape=(record_tokens,), dtype=np.dtype(dtype), encoding=stored),
        "num_tokens": tfds.features.Scalar(dtype=np.int32),
        "ends": tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding=stored),
    })


_loading = threading.Lock()


@cache
def load_codec(record_tokens: int, dtype: str) -> None:
    """Import everything that `encode` and `decode` need; call this before starting threads.

    TFDS imports parts of itself on first use, under its own locks: two threads that decode their first record at the
    same time can deadlock (seen with tensorflow-datasets 4.9.10 on Python 3.11).
    """
    with _loading:
        tokens = np.zeros(record_tokens, dtype)
        decode(encode(Record(tokens, record_tokens, np.zeros(0, np.int32))), record_tokens=record_tokens, dtype=dtype)


def encode(record: Record) -> bytes:
    """A record as the bytes of its tf.train.Example, the same in every process."""
    from tensorflow_datasets.proto import tf_example_pb2

    tokens = record.tokens
    data = features(len(tokens), tokens.dtype.name).serialize_example(
        {"tokens": tokens, "num_tokens": np.int32(record.num_tokens), "ends": np.asarray(record.ends, np.int32)})
    # TFDS writes the features in the order of a hash map, whose seed differs in each process.
    return tf_example_pb2.Example.FromString(data).SerializeToString(deterministic=True)


def decode(data: bytes, *, record_tokens: int, dtype: str) -> Record:
    """Decode a record. Raises ValueError if the bytes are not a record, or its offsets are out of range."""
    values = features(record_tokens, dtype).deserialize_example_np(data)
    record = Record(values["tokens"], int(values["num_tokens"]), values["ends"])
    if record.tokens.shape != (record_tokens,) or not 0 < record.num_tokens <= record_tokens:
        raise ValueError(f"{record.num_tokens} tokens in an array of {record.tokens.shape}; R is {record_tokens}")
    ends = record.ends
    if len(ends) and (ends[0] < 1 or ends[-1] > record.num_tokens or (np.diff(ends) < 1).any()):
        raise ValueError(f"document ends {ends.tolist()} do not rise within 1..{record.num_tokens}")
    return record
