"""Directories that appear complete or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold the lock of `directory`, which need not exist; other processes of this host wait for it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    path = directory.parent / f".{directory.name}.lock"
    while True:
        with open(path, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("waiting for another process that writes %s", directory)
                fcntl.flock(file, fcntl.LOCK_EX)
            # The previous holder removes the file, and a lock on a removed file excludes nobody.
            if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A temporary directory next to `directory`, renamed to it if the block succeeds and removed if it fails.

    Hold `exclusive(directory)` around it: leftovers of a killed process of this host are removed at the start. Raises
    OSError if `directory` exists by then, made by another host on a file system without locks between hosts.
    """
    prefix = f"{directory.name}.tmp-{socket.gethostname()}-"
    for left in list(directory.parent.iterdir()) if directory.parent.exists() else []:
        if left.name.startswith(prefix):
            shutil.rmtree(left)
    temporary = directory.parent / f"{prefix}{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            flush(path)
        flush(temporary)
        temporary.rename(directory)
        flush(directory.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def flush(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
