"""Shards of datasets on an object store, cached as whole files on this machine's disk, because random reads need a
file.

A cached shard is named by its SHA-256, so it matches the manifest of any dataset that refers to it. All
processes of a machine share the folder: one process downloads a shard into a temporary file of the full length,
compares size and SHA-256, and renames it, while the others wait. A reader holds a lock on its shard, which the kernel
releases when the process ends in any way. If space is needed, shards without readers are removed, least recently used
first.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ctllm_jax.config.errors import UserError
from ctllm_jax.dataset.manifest import Shard
from ctllm_jax.storage import StoreError, read_blocks

log = logging.getLogger(__name__)
_SUFFIX, _PART = ".arrayrecord", ".part"
_PATIENCE = 600.0
"""Seconds that a store may fail before a download gives up."""
_held: dict[Path, int] = {}
"""Files that this process has opened and locked, until it ends."""


class ShardCache:
    """Shards on this machine's disk; can be pickled.

    Args:
      folder: made if it does not exist.
      limit: largest total size of all shards, in bytes.
    """

    def __init__(self, folder: Path, *, limit: int):
        self.folder, self.limit = folder, limit

    def take(self, source: Path, shard: Shard) -> Path:
        """Return the file of a shard, which is kept while this process lives.

        Args:
          source: its place on the object store.

        Raises:
          UserError: there is no space, or the object differs from the manifest.
          StoreError: it could not be read for ten minutes, or the error is permanent.
        """
        target = self.folder / (shard.sha256 + _SUFFIX)
        while not self._hold(target, shard):
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / f"{shard.sha256}.lock"):
                if not target.exists():
                    self._download(source, target, shard)
        return target

    def _hold(self, target: Path, shard: Shard) -> bool:
        if target in _held:
            return True
        try:
            file = os.open(target, os.O_RDONLY)
        except FileNotFoundError:
            return False
        fcntl.flock(file, fcntl.LOCK_SH)
        try:
            same = os.stat(target).st_ino == os.fstat(file).st_ino
        except FileNotFoundError:
            same = False
        if not same:  # removed in between
            os.close(file)
            return False
        if os.fstat(file).st_size != shard.size:
            os.close(file)
            raise UserError(f"{target} has another size than the {shard.size:,} bytes of its shard: remove it")
        os.utime(target)
        _held[target] = file
        return True

    def _download(self, source: Path, target: Path, shard: Shard) -> None:
        part = target.with_suffix(_PART)
        with _locked(self.folder / "room.lock"):
            self._make_room(shard.size, source, keep=part)
            try:
                with open(part, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, max(shard.size, 1))
            except OSError as error:
                part.unlink(missing_ok=True)
                raise UserError(f"data.cache_dir: no room below {self.folder} for {shard.size / 2**20:,.1f} MiB of"
                                f" {source}: {error.strerror}") from error
        began, wait = time.monotonic(), 1.0
        while True:
            try:
                size, digest = _copy(source, part)
                break
            except FileNotFoundError:
                part.unlink(missing_ok=True)
                raise UserError(f"{source} is missing") from None
            except StoreError as error:
                if error.lasting or time.monotonic() - began > _PATIENCE:
                    part.unlink(missing_ok=True)
                    raise
                log.warning("%s; retrying", error)
                time.sleep(wait * random.uniform(0.5, 1))
                wait = min(2 * wait, 30.0)
        if (size, digest) != (shard.size, shard.sha256):
            part.unlink(missing_ok=True)
            raise UserError(f"{source} is not what its manifest says: {size:,} bytes with the SHA-256 {digest[:16]}…,"
                            f" and should be {shard.size:,} with {shard.sha256[:16]}…")
        os.replace(part, target)

    def _make_room(self, needed: int, source: Path, *, keep: Path) -> None:
        """Remove files that nobody reads or downloads, least recently used first, until there is space."""
        files = []
        for path in self.folder.iterdir():
            if path.suffix in (_SUFFIX, _PART) and path != keep:
                with suppress(FileNotFoundError):  # a partial file that was just renamed to a shard
                    files.append((path.stat().st_mtime, path.stat().st_size, path))
        used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if used + needed <= self.limit:
                return
            if _remove_unused(path):
                used -= size
        if used + needed > self.limit:
            raise UserError(f"data.cache_gb={self.limit / 1e9:g}: {source} takes {needed / 1e9:.3g} GB, and shards of"
                            f" {used / 1e9:.3g} GB in {self.folder} are in use: raise it")


def _copy(source: Path, part: Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with open(part, "r+b") as file:
        for block in read_blocks(source):
            digest.update(block)
            size += len(block)
            file.write(block)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _remove_unused(path: Path) -> bool:
    """Remove a shard without readers, or a partial file that nobody downloads any more."""
    if path in _held:
        return False
    lock = path if path.suffix == _SUFFIX else path.with_suffix(".lock")
    file = os.open(lock, os.O_RDWR | (os.O_CREAT if lock != path else 0), 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock for one process at a time, released if the process is killed."""
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
