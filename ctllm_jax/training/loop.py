"""The loop: a batch, a step, and hooks. It knows neither evaluation nor sampling.

Metrics are read one logged step late, so that the host never waits for the step that it has just sent off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from ctllm_jax.training.state import State

Hook = Callable[[int, State], None]
"""`(steps done, state)`, called after every step; the state is valid until the hook returns."""


@dataclass
class Clock:
    """Wall time since the last reading: of whole steps, waiting for data, and inside hooks."""

    started: float = field(default_factory=time.perf_counter)
    waiting: float = 0.0
    hooks: float = 0.0
    steps: int = 0

    def read(self) -> dict[str, float]:
        """Seconds a step (hooks taken out) and the share of them spent waiting for data; starts anew."""
        now = time.perf_counter()
        seconds = max(now - self.started - self.hooks, 1e-9)
        reading = {"step_seconds": seconds / max(self.steps, 1), "data_wait": min(self.waiting / seconds, 1.0)}
        self.started, self.waiting, self.hooks, self.steps = now, 0.0, 0.0, 0
        return reading


def run_loop(state: State, train_step: Callable, batches: Iterator[Any], *, start: int, stop: int, log_every: int,
             record: Callable[[int, dict[str, Any], dict[str, float]], None], hooks: Sequence[Hook] = (),
             frozen: Any = None) -> State:
    """Train from step `start` to step `stop`.

    Args:
      state: at step `start`; donated.
      train_step: compiled, `(state, batch, frozen) -> (state, metrics)`.
      batches: global batches on the devices, the first for step `start`.
      log_every: steps between two records.
      record: `(step, metrics as floats, {step_seconds, data_wait})`, one logged step late; the last comes at the end.
      hooks: called after every step, outside of the transfer guard.

    Returns:
      The state at `stop`.
    """
    clock = Clock()
    pending: tuple[int, Any, dict[str, float]] | None = None

    def flush() -> None:
        if pending is not None:
            step, metrics, timing = pending
            record(step, {name: float(value) for name, value in jax.device_get(metrics).items()}, timing)

    for step in range(start + 1, stop + 1):
        began = time.perf_counter()
        batch = next(batches)
        clock.waiting += time.perf_counter() - began
        with jax.transfer_guard("disallow"):
            state, metrics = train_step(state, batch, frozen)
        clock.steps += 1
        if step % log_every == 0 or step == stop:
            # The previous record's numbers are ready by now; reading them paces the host to the devices.
            flush()
            if step == stop:
                jax.block_until_ready(metrics)
            pending = step, metrics, clock.read()
        began = time.perf_counter()
        for hook in hooks:
            hook(step, state)
        clock.hooks += time.perf_counter() - began
    flush()
    return state
