"""Random access to the token streams of a dataset directory."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from ctllm_jax.config.errors import UserError
from ctllm_jax.dataset.damage import DamagedShard, DamageLog
from ctllm_jax.dataset.manifest import Manifest, Shard, read_manifest
from ctllm_jax.dataset.records import Record, decode, load_codec
from ctllm_jax.dataset.shard_cache import ShardCache
from ctllm_jax.storage import in_parallel, is_remote, list_objects, local_copy, open_path

_NAMED = 10
"""Number of shards named in one message."""


class Window(NamedTuple):
    """A window of one stream. tokens: [n]; ends: offsets in it one past each EOD, in 1..n.

    If a record was replaced, its beginning and end are also in `ends`, because the tokens on both sides do not belong
    together.
    """

    tokens: np.ndarray
    ends: np.ndarray


class ShardReader:
    """Any window of one shard's stream. Opens its file on first read; can be pickled and shared by threads.

    With `cache`, the file is a local copy of a shard on an object store. With `damage`, an unreadable record is
    replaced in `window`, and recorded there.
    """

    def __init__(self, path: Path, shard: Shard, *, record_tokens: int, dtype: str, cache: ShardCache | None = None,
                 damage: DamageLog | None = None):
        self.path = path
        self._cache = cache
        self.shard = shard
        self._record_tokens = record_tokens
        self._dtype = dtype
        self._damage = damage
        self._replaced: dict[int, int] = {}
        self._reader = None
        self._lock = threading.Lock()
        load_codec(record_tokens, dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        # In a worker process this is before its threads start.
        load_codec(self._record_tokens, self._dtype)

    def record(self, index: int) -> Record:
        """Read record `index`. Raises DamagedShard if it cannot be read."""
        reader = self.open()
        try:
            return decode(reader.read([index])[0], record_tokens=self._record_tokens, dtype=self._dtype)
        # The C++ reader raises IndexError and RuntimeError, the protocol buffer its own errors: all mean damage here.
        except Exception as error:
            raise DamagedShard(f"{self.path}: record {index} cannot be read: {error}. The other records are not "
                               f"affected; `data verify {self.path.parent}` checks them all") from error

    def readable(self, index: int) -> tuple[Record, bool]:
        """Return record `index`, or its replacement if it is damaged, and whether it was replaced.

        The replacement is the next readable record of the shard, with the first after the last: the same in every
        process and after every restart. Raises DamagedShard if no record can be read, or too many cannot.
        """
        if index not in self._replaced:
            try:
                return self.record(index), False
            except DamagedShard as error:
                if self._damage is None:
                    raise
                return self._replace(index, error), True
        return self._shortened(self.record(self._replaced[index]), index), True

    def _replace(self, index: int, error: DamagedShard) -> Record:
        with self._lock:
            self._reader = None  # a network file system may have lost the file, not the record
        try:
            return self.record(index)
        except DamagedShard:
            pass
        for step in range(1, self.shard.records):
            other = (index + step) % self.shard.records
            if self._tokens_of(other) < self._tokens_of(index):
                continue
            try:
                record = self._shortened(self.record(other), index)
            except DamagedShard:
                continue
            self._damage.note(self.path, index, replaced_by=other, why=str(error.__cause__))
            self._replaced[index] = other
            return record
        raise error

    def _tokens_of(self, index: int) -> int:
        return min(self._record_tokens, self.shard.tokens - index * self._record_tokens)

    def _shortened(self, record: Record, index: int) -> Record:
        tokens = self._tokens_of(index)
        return Record(record.tokens, tokens, record.ends[record.ends <= tokens])

    def window(self, start: int, length: int) -> Window:
        """Tokens [start, start + length) of the stream, fewer at its end."""
        size = self._record_tokens
        stop = min(start + length, self.shard.tokens)
        tokens, ends, seams = [], [], []
        for index in range(start // size, -(-stop // size)):
            record, replaced = self.readable(index)
            first, last = max(start - index * size, 0), min(stop - index * size, record.num_tokens)
            tokens.append(record.tokens[first:last])
            inside = record.ends[(record.ends > first) & (record.ends <= last)]
            ends.append(inside + (index * size - start))
            if replaced:
                seams += [place + index * size - start for place in (0, record.num_tokens)]
        all_ends = np.concatenate(ends)
        if seams:
            all_ends = np.array(sorted({*all_ends.tolist(), *(seam for seam in seams if 0 < seam <= stop - start)}))
        return Window(np.concatenate(tokens), all_ends.astype(np.int32))

    def open(self):
        """The ArrayRecord reader. Raises DamagedShard if the file is not ArrayRecord, or has another number of
        records."""
        with self._lock:
            if self._reader is None:
                path = self.path if self._cache is None else self._cache.take(self.path, self.shard)
                try:
                    reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
                    records = reader.num_records()
                except Exception as error:
                    raise DamagedShard(f"{self.path} cannot be opened: {error}") from error
                if records != self.shard.records:
                    raise DamagedShard(f"{self.path} holds {records} records, the manifest says {self.shard.records}")
                self._reader = reader
            return self._reader


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


class SplitReader:
    """The streams of one split."""

    def __init__(self, directory: Path, manifest: Manifest, split: str, *, cache: ShardCache | None = None,
                 damage: DamageLog | None = None):
        self.directory = directory
        self.record_tokens = manifest.record_tokens
        self.shards = [ShardReader(directory / shard.file, shard, record_tokens=manifest.record_tokens,
                                   dtype=manifest.dtype, cache=cache, damage=damage)
                       for shard in manifest.splits[split].shards]

    def check_sizes(self) -> None:
        """Raise DamagedShard if shards are missing or have another size than in the manifest: cheap, done at every
        start.

        On a store this uses a listing; on a disk, which may be local to this machine, all files are checked in
        parallel.
        """
        if is_remote(self.directory):
            listed = {name: entry.size for name, entry in list_objects(self.directory).items()}
            sizes = [listed.get(reader.path.name) for reader in self.shards]
        else:
            sizes = in_parallel(_size, [reader.path for reader in self.shards])
        problems = []
        for reader, size in zip(self.shards, sizes, strict=True):
            if size is None:
                problems.append(f"{reader.path} is missing")
            elif size != reader.shard.size:
                state = "truncated" if size < reader.shard.size else "changed"
                problems.append(f"{reader.path} is {state}: {size} bytes, the manifest says {reader.shard.size}")
        if problems:
            more = [f"… and {len(problems) - _NAMED} more"] if len(problems) > _NAMED else []
            raise DamagedShard("\n  ".join(problems[:_NAMED] + more))


class Dataset:
    """A dataset directory. Raises UserError if it is not one.

    Attributes:
      cache: local cache of its shards; None if the directory is on a disk.
    """

    def __init__(self, directory: Path | str, *, cache: ShardCache | None = None):
        self.directory, self.cache = open_path(directory), cache
        self.manifest = read_manifest(self.directory)
        self.tokenizer_path = local_copy(self.directory / self.manifest.tokenizer.file)

    def split(self, name: str, *, damage: DamageLog | None = None) -> SplitReader:
        """A split with at least one token. UserError names the splits that exist.

        With `damage`, unreadable records are replaced and recorded there; without, they raise.
        """
        existing = [split for split, content in self.manifest.splits.items() if content.shards]
        if name not in existing:
            there = ", ".join(existing) or "none"
            raise UserError(f"{self.directory} has no split {name!r} with data; its splits: {there}")
        reader = SplitReader(self.directory, self.manifest, name, cache=self.cache, damage=damage)
        reader.check_sizes()
        return reader
