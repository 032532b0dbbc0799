"""Where the wall time of a run goes: at any moment the main thread is in one phase, so that the phases add up to it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

STEPPING = ("step", "data_wait")
"""Phases of the loop itself; all others are slow ones, in which no step is made."""
INTERVAL = 30.0
"""Seconds between two events that keep the sums: what a killed attempt can lose of them."""


class Ledger:
    """Seconds of this attempt by phase; read by any thread, moved by the main one.

    `began`: when it began, by `time.perf_counter`, such as `process_began()`; None: now.
    """

    def __init__(self, *, began: float | None = None):
        self.current = "init"
        self.turned = time.monotonic()
        """When a slow phase last began or ended: a sign of life."""
        self._seconds: dict[str, float] = {}
        self._told = time.perf_counter()
        self._since = self._told if began is None else began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside of it time counts as `name`; behind it, as what it was before."""
        before = self.current
        self._move(name)
        try:
            yield
        finally:
            self._move(before)

    def read(self) -> dict[str, float]:
        """Seconds of each phase so far."""
        self._move(self.current)
        return dict(self._seconds)

    def due(self) -> bool:
        """Whether the sums should be written down again."""
        return time.perf_counter() - self._told >= INTERVAL

    def told(self) -> dict[str, float]:
        """`read`, to be written down now."""
        self._told = time.perf_counter()
        return {name: round(seconds, 4) for name, seconds in self.read().items()}

    def _move(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self._since
        self._since = now
        if name != self.current and not (name in STEPPING and self.current in STEPPING):
            self.turned = time.monotonic()
        self.current = name


def process_began() -> float:
    """When this process was started, by `time.perf_counter`; now, where the system does not say."""
    now = time.perf_counter()
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            # Behind the name in parentheses, which may hold anything, the twentieth: clock ticks since boot.
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return now - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return now
