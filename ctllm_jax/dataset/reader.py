"""Random access to the token streams of a dataset directory."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from ctllm_jax.config.errors import UserError
from ctllm_jax.dataset.manifest import Manifest, Shard, read_manifest
from ctllm_jax.dataset.records import Record, decode, load_codec


class DamagedShard(UserError):
    """A shard is not what the manifest says, or a record of it cannot be read."""


class Window(NamedTuple):
    """A stretch of one stream. tokens: [n]; ends: offsets in it one past each EOD, in 1..n."""

    tokens: np.ndarray
    ends: np.ndarray


class ShardReader:
    """Any stretch of one shard's stream. Opens its file when first read; may be pickled and shared by threads."""

    def __init__(self, path: Path, shard: Shard, *, record_tokens: int, dtype: str):
        self.path = path
        self.shard = shard
        self._record_tokens = record_tokens
        self._dtype = dtype
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
        """Record `index`. DamagedShard where it cannot be read."""
        reader = self.open()
        try:
            return decode(reader.read([index])[0], record_tokens=self._record_tokens, dtype=self._dtype)
        # The C++ reader raises IndexError and RuntimeError, the protocol buffer its own errors: all mean damage here.
        except Exception as error:
            raise DamagedShard(f"{self.path}: record {index} cannot be read: {error}. The other records are not "
                               f"affected; `data verify {self.path.parent}` checks them all") from error

    def window(self, start: int, length: int) -> Window:
        """Tokens [start, start + length) of the stream, fewer at its end."""
        size = self._record_tokens
        stop = min(start + length, self.shard.tokens)
        tokens, ends = [], []
        for index in range(start // size, -(-stop // size)):
            record = self.record(index)
            first, last = max(start - index * size, 0), min(stop - index * size, record.num_tokens)
            tokens.append(record.tokens[first:last])
            inside = record.ends[(record.ends > first) & (record.ends <= last)]
            ends.append(inside + (index * size - start))
        return Window(np.concatenate(tokens), np.concatenate(ends).astype(np.int32))

    def open(self):
        """The ArrayRecord reader. DamagedShard where the file is none, or holds another number of records."""
        with self._lock:
            if self._reader is None:
                try:
                    reader = ArrayRecordReader(str(self.path), "readahead_buffer_size:0")
                    records = reader.num_records()
                except Exception as error:
                    raise DamagedShard(f"{self.path} cannot be opened: {error}") from error
                if records != self.shard.records:
                    raise DamagedShard(f"{self.path} holds {records} records, the manifest says {self.shard.records}")
                self._reader = reader
            return self._reader


class SplitReader:
    """The streams of one split."""

    def __init__(self, directory: Path, manifest: Manifest, split: str):
        self.record_tokens = manifest.record_tokens
        self.shards = [ShardReader(directory / shard.file, shard, record_tokens=manifest.record_tokens,
                                   dtype=manifest.dtype) for shard in manifest.splits[split].shards]

    def check_sizes(self) -> None:
        """DamagedShard where a shard is missing, or not as long as the manifest says: cheap, done at every start."""
        for reader in self.shards:
            size = reader.path.stat().st_size if reader.path.exists() else None
            if size is None:
                raise DamagedShard(f"{reader.path} is missing")
            if size != reader.shard.size:
                state = "truncated" if size < reader.shard.size else "changed"
                raise DamagedShard(f"{reader.path} is {state}: {size} bytes, the manifest says {reader.shard.size}")


class Dataset:
    """A dataset directory. UserError where it is none."""

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self.tokenizer_path = self.directory / self.manifest.tokenizer.file

    def split(self, name: str) -> SplitReader:
        """A split with at least one token. UserError names the splits that exist."""
        existing = [split for split, content in self.manifest.splits.items() if content.shards]
        if name not in existing:
            there = ", ".join(existing) or "none"
            raise UserError(f"{self.directory} has no split {name!r} with data; its splits: {there}")
        reader = SplitReader(self.directory, self.manifest, name)
        reader.check_sizes()
        return reader
