"""Wall time of a run by phase: the main thread is always in exactly one phase, so the phases sum to the total."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

STEPPING = ("step", "data_wait")
"""Phases of the loop itself; all others are slow phases, in which no step is made."""
INTERVAL = 30.0
"""Seconds between two events that record the sums; a killed attempt loses at most this much."""


class Ledger:
    """Seconds of this attempt by phase; any thread may read them, the main thread changes the phase.

    `began`: start time by `time.perf_counter`; None: now.
    """

    def __init__(self, *, began: float | None = None):
        self.current = "init"
        self.turned = time.monotonic()
        """Time at which a slow phase last began or ended, as a sign of progress."""
        self._seconds: dict[str, float] = {}
        self._told = time.perf_counter()
        self._since = self._told if began is None else began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside the context, time counts as `name`; afterwards, as the previous phase."""
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
        """Whether the sums should be recorded again."""
        return time.perf_counter() - self._told >= INTERVAL

    def told(self) -> dict[str, float]:
        """`read`, for a record written now."""
        self._told = time.perf_counter()
        return {name: round(seconds, 4) for name, seconds in self.read().items()}

    def _move(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self._since
        self._since = now
        if name != self.current and not (name in STEPPING and self.current in STEPPING):
            self.turned = time.monotonic()
        self.current = name
