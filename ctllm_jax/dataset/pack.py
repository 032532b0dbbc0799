"""Convert documents to ids, and ids to the shards of a split."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ctllm_jax.dataset.manifest import Shard
from ctllm_jax.dataset.shuffle import Text
from ctllm_jax.dataset.writer import ShardWriter, shard_name

_CHUNK_BYTES = 8 * 2**20  # of text handed to the tokenizer at once
logger = logging.getLogger(__name__)


class TextTokenizer(Protocol):
    """The tokenizer methods used here; see `ctllm_jax.data.tokenizer`."""

    path: Path
    sha256: str
    vocab_size: int
    eos_id: int | None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""


@dataclass
class Tokenized:
    """Ids of some documents, in a file: `tokens` and `text_bytes` are int64 [documents]."""

    path: Path
    tokens: np.ndarray
    text_bytes: np.ndarray

    def documents(self, dtype: str) -> Iterator[np.ndarray]:
        """The ids of each document."""
        start = 0
        ids = np.memmap(self.path, dtype, "r") if self.tokens.sum() else np.empty(0, dtype)
        for length in self.tokens:
            yield ids[start:start + length]
            start += length


def tokenize(texts: Sequence[Text], tokenizer: TextTokenizer, path: Path, *, dtype: str) -> Tokenized:
    """Write the ids of these documents to `path`, one after the other, without EOD."""
    tokens: list[int] = []
    with open(path, "wb") as file:
        for chunk in _chunks(texts):
            for ids in tokenizer.encode_batch([text.data.decode("utf-8") for text in chunk]):
                file.write(np.asarray(ids, dtype).tobytes())
                tokens.append(len(ids))
    return Tokenized(path, np.asarray(tokens, np.int64), np.asarray([len(text.data) for text in texts], np.int64))


def pack(parts: Sequence[Tokenized], directory: Path, *, name: str, split: str, shards: int, record_tokens: int,
         dtype: str, eod_id: int) -> list[Shard]:
    """Write the documents of `parts`, in order, as at most `shards` streams of about the same number of tokens."""
    lengths = np.concatenate([part.tokens for part in parts]) + 1
    # Shards that a long document would leave empty are not made.
    used, places = np.unique(places_of(lengths, shards), return_inverse=True)
    if len(used) < shards:
        logger.warning("split %s: %d documents fill %d of %d shards", split, len(lengths), len(used), shards)
    written: list[Shard] = []
    writer, document = None, 0
    for part in parts:
        for ids, text_bytes in zip(part.documents(dtype), part.text_bytes, strict=True):
            if writer is None or places[document] != places[document - 1]:
                if writer is not None:
                    written.append(writer.close())
                writer = ShardWriter(directory / shard_name(name, split, len(written), len(used)),
                                     record_tokens=record_tokens, dtype=dtype, eod_id=eod_id)
            writer.add(ids, text_bytes=int(text_bytes))
            document += 1
    written.append(writer.close())
    return written


def places_of(lengths: np.ndarray, shards: int) -> np.ndarray:
    """The shard of each document, int64, non-decreasing: the one that contains the middle of its tokens."""
    starts = np.cumsum(lengths) - lengths
    return ((2 * starts + lengths) * shards // (2 * lengths.sum())).astype(np.int64)


def _chunks(texts: Sequence[Text]) -> Iterator[list[Text]]:
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text.data)
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
