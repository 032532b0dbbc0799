"""A work unit of reading: a file or a range of it, as plain values that go to another process or into a commit."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol, TypedDict

NUL = "NUL characters, left out of text that is kept"
"""What `Tally.left_out` counts them as."""


class InputUnit(TypedDict):
    """What `read_unit` reads. All values are JSON.

    `id` is unique over all units of a plan and safe as a file name. `file` is the path or URL, `name` its path below
    the input folder. `start` and `stop` are bytes of uncompressed JSON lines or row groups of Parquet, half open; None:
    the whole file. `first` is the position of its first record, from 1. `size` is the unit's share of `file_size`,
    bytes as they lie in storage. `sample` is the start of the file's first record, or None.
    """

    id: str
    source: str
    file: str
    name: str
    kind: str
    compression: str | None
    encoding: str | None
    text_field: str | None
    id_field: str | None
    url_field: str | None
    time_field: str | None
    start: int | None
    stop: int | None
    first: int
    size: int
    file_size: int
    sample: dict | None


class Quarantine(Protocol):
    """Where readers put bad records aside."""

    def put(self, file: str, position: int, reason: str, raw: bytes = b"") -> None: ...


def check_size(size: int, limit: int, what: str) -> None:
    """ValueError where `size` bytes are more than a record may have."""
    if size > limit:
        raise ValueError(f"{what} has more than {limit >> 20} MiB, the largest record that max_record_mib allows")


@dataclass
class Tally:
    """What a reader counts beside its records: documents by encoding, and what was left out on purpose, by reason."""

    encodings: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
