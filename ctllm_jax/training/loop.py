"""The loop: a batch, a step, and hooks. It knows neither evaluation nor sampling.

Metrics are read one step late: the host asks for those of a step when the next one is already on its way, and so never
leaves the devices idle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from ctllm_jax.training.state import State
from ctllm_jax.training.supervision.goodput import Ledger


@dataclass(frozen=True)
class Hook:
    """Something to do between steps.

    Attributes:
      call: `(steps done, state) -> None`; the state is valid until it returns.
      due: `step -> bool`, after which steps it is called.
      phase: what its time counts as in the ledger.
    """

    call: Callable[[int, State], None]
    due: Callable[[int], bool]
    phase: str = "hooks"


def every(interval: int, *, last: int) -> Callable[[int], bool]:
    """Due at each multiple of `interval`, and at the step `last`."""
    return lambda step: step % interval == 0 or step == last


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
             frozen: Any = None, stop_due: Callable[[int], bool] = lambda step: False,
             judge: Callable[[int, dict[str, Any]], bool] | None = None, ledger: Ledger | None = None,
             dispatched: Callable[[int, dict[str, Any]], None] = lambda step, metrics: None) -> State:
    """Train from step `start` to step `stop`, or to the one behind which `stop_due` ends it.

    Args:
      state: at step `start`; donated.
      train_step: compiled, `(state, batch, frozen) -> (state, metrics)`.
      batches: global batches on the devices, the first for step `start`.
      log_every: steps between two records; the last step always has one.
      record: `(step, metrics as floats, {step_seconds, data_wait})`, called when the next step is on its way, or before
        a hook of the same step.
      hooks: called in order, outside of the transfer guard; their time counts for no step.
      stop_due: asked once for each step, when it is on its way and before its hooks; they are called all the same.
      judge: `(step, metrics on the devices)`, asked of each step when the next one is on its way, or before a hook of
        the same step; where it says True the loop ends, and that next one is given up.
      ledger: told where the time goes.
      dispatched: `(step, metrics on the devices)`, told of each step that is on its way.

    Returns:
      The state behind the last step made.
    """
    clock, ledger = Clock(), ledger or Ledger()
    pending: tuple[int, Any] | None = None

    def settle() -> bool:
        """Record the step before if it is to be, and have it judged."""
        nonlocal pending
        if pending is None:
            return False
        (step, metrics), pending = pending, None
        if step % log_every == 0 or step == stop:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            record(step, values, clock.read())
        return judge is not None and judge(step, metrics)

    for step in range(start + 1, stop + 1):
        began = time.perf_counter()
        with ledger.phase("data_wait"):
            batch = next(batches)
        clock.waiting += time.perf_counter() - began
        with jax.transfer_guard("disallow"):
            state, metrics = train_step(state, batch, frozen)
        dispatched(step, metrics)
        if settle():
            return state
        clock.steps += 1
        pending = step, metrics
        stopping = stop_due(step)
        due = [hook for hook in hooks if hook.due(step)]
        if due:
            jax.block_until_ready(metrics)
            if settle():
                return state
            began = time.perf_counter()
            for hook in due:
                with ledger.phase(hook.phase):
                    hook.call(step, state)
            clock.hooks += time.perf_counter() - began
        if stopping:
            break
    settle()
    return state
