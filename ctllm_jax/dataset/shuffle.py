"""Shuffle documents on disk and drop exact duplicates, in an order that only the seed determines.

A document's key is a keyed hash of its text. Documents are spilled into buckets by key, and each bucket is sorted when
it is read back: memory holds one bucket, duplicates are in the same bucket, and neither the order of the input nor the
number of buckets changes the result.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ctllm_jax.dataset.text import Document

BUCKET_BYTES = 64 * 2**20
_MOST_BUCKETS = 256  # this many files are open at once
_HEAD = struct.Struct("<Q16sQI")
RANGE = 2**64
"""Upper bound of keys and split values."""


class Text(NamedTuple):
    """A document during the shuffle: `key` determines the order, `digest` (128 bits) identifies the text, `split_value`
    is in 0..2**64-1 and does not depend on the seed."""

    key: int
    digest: bytes
    index: int
    data: bytes

    @property
    def split_value(self) -> int:
        return int.from_bytes(self.digest[:8], "little")


@dataclass
class Spilled:
    """Buckets on disk, in order of key, and counts of their documents."""

    buckets: list[Path]
    documents: int = 0
    empty: int = 0
    text_bytes: int = 0
    lowest_split_value: int = RANGE
    highest_split_value: int = -1
    sizes: list[int] = field(default_factory=list)


def as_text(text: str, *, index: int, seed: int) -> Text:
    """A document with its key for this seed."""
    data = text.encode("utf-8")
    digest = hashlib.blake2b(data, digest_size=16).digest()
    key = int.from_bytes(hashlib.blake2b(digest, digest_size=8, key=str(seed).encode()).digest(), "little")
    return Text(key, digest, index, data)


def spill(documents: Iterable[Document], directory: Path, *, seed: int, expected_bytes: int) -> Spilled:
    """Write documents into buckets; documents without text are only counted. `expected_bytes` sizes the buckets."""
    count = max(1, min(_MOST_BUCKETS, -(-expected_bytes // BUCKET_BYTES)))
    spilled = Spilled([directory / f"bucket-{index:03d}" for index in range(count)], sizes=[0] * count)
    with ExitStack() as stack:
        files = [stack.enter_context(open(bucket, "wb", buffering=2**18)) for bucket in spilled.buckets]
        for document in documents:
            if not document.text.strip():
                spilled.empty += 1
                continue
            text = as_text(document.text, index=spilled.documents, seed=seed)
            data = text.data
            place = text.key * count // RANGE
            files[place].write(_HEAD.pack(text.key, text.digest, text.index, len(data)))
            files[place].write(data)
            spilled.documents += 1
            spilled.text_bytes += len(data)
            spilled.sizes[place] += len(data)
            spilled.lowest_split_value = min(spilled.lowest_split_value, text.split_value)
            spilled.highest_split_value = max(spilled.highest_split_value, text.split_value)
    return spilled


def read_bucket(bucket: Path, *, deduplicate: bool) -> list[Text]:
    """The documents of a bucket in order of key; only one of exact duplicates if `deduplicate`."""
    texts = sorted(_read_all(bucket))
    if not deduplicate:
        return texts
    return [text for place, text in enumerate(texts) if not place or texts[place - 1].digest != text.digest]


def _read_all(bucket: Path) -> Iterator[Text]:
    with open(bucket, "rb") as file:
        while head := file.read(_HEAD.size):
            key, digest, index, length = _HEAD.unpack(head)
            yield Text(key, digest, index, file.read(length))


def held_out_limit(lowest: int, highest: int, fraction: float) -> int:
    """Return the split value below which a document is held out, for documents between these split values.

    About `fraction` of the documents are held out; if there are two or more, at least one is and at least one is not.
    """
    if not fraction or lowest >= highest:
        return 0
    return min(max(int(fraction * RANGE), lowest + 1), highest)
