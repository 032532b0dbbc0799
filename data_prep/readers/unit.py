"""A work unit of reading: a file or a range of it, as plain values that go to another process or into a commit."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypedDict

NUL = "NUL characters, left out of text that is kept"
"""What `Tally.left_out` counts them as."""
_LOOK = 0.25
"""Seconds between two looks at the time that records take."""


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


class _TimeIsUp(BaseException):
    """Not an Exception, so that no parser takes it for one of its own."""


class _Watcher:
    """One thread that looks at the CPU time of the threads that have a limit, and raises `_TimeIsUp` in them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.limits: dict[int, float] = {}
        self._raise = ctypes.pythonapi.PyThreadState_SetAsyncExc
        threading.Thread(target=self._watch, daemon=True, name="record_seconds").start()

    def end(self, thread: int) -> None:
        """End the limit of a thread, and take back what was raised and has not arrived."""
        with self.lock:
            self.limits.pop(thread, None)
            self._raise(ctypes.c_ulong(thread), None)

    def _watch(self) -> None:
        while True:
            time.sleep(_LOOK)
            with self.lock:
                for thread, limit in self.limits.items():
                    if time.clock_gettime(time.pthread_getcpuclockid(thread)) > limit:
                        self._raise(ctypes.c_ulong(thread), ctypes.py_object(_TimeIsUp))


@functools.cache
def _watcher(process: int) -> _Watcher:
    return _Watcher()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """ValueError where the block takes more than `seconds` of this thread's CPU time.

    Python code is interrupted. A function written in C is interrupted when it returns.
    """
    watcher, thread = _watcher(os.getpid()), threading.get_ident()
    with watcher.lock:
        watcher.limits[thread] = time.thread_time() + seconds
    try:
        try:
            yield
        finally:
            watcher.end(thread)
    except _TimeIsUp:
        watcher.end(thread)
        raise ValueError(f"it takes more than {seconds:g} s of CPU time, which record_seconds allows") from None


@dataclass
class Tally:
    """What a reader counts beside its records: documents by encoding, and what was left out on purpose, by reason."""

    encodings: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
