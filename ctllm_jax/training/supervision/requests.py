"""Requests to a running run: signals, and files in its directory. All processes take the same decision.

| file | what happens |
|---|---|
| STOP | the run saves this step, and ends with status 0 |
| SAVE | the run saves a resumable checkpoint of this step, and continues |
| PROFILE | a trace of the next five steps of the first process, in RUN/profile |

A file is removed when the run obeys it. Signals can reach any process, and the first process checks for files. About
once a second they exchange requests by a collective of three numbers, which is read one step later, so that no device
waits for a host. On an object store, a thread polls every few seconds, because a request takes tens of milliseconds.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctllm_jax.storage import is_remote, list_names, told, upload_tree
from ctllm_jax.training.loop import Hook
from ctllm_jax.training.supervision.signals import REASONS, Signals

log = logging.getLogger(__name__)
STOP, SAVE, PROFILE = "STOP", "SAVE", "PROFILE"
TRACES = "profile"
PROFILED_STEPS = 5
_NUMBERS = {None: 0, **{reason: number for number, reason in enumerate(REASONS, 1)}}
_NAMES = {number: reason for reason, number in _NUMBERS.items()}
_SECONDS = 1.0
"""Approximate seconds between two checks for files and exchanges between the processes."""
_MOST_STEPS = 1000
_REMOTE_SECONDS = 5.0


class Requests:
    """Decides at every step what to do after it.

    Args:
      directory: the run directory.
      signals: the signals of this process.
      tell: `(step, what)`, called once for every obeyed request, on every process.
    """

    def __init__(self, directory: Path, signals: Signals, *, tell: Callable[[int, str], None]):
        self.reason: str | None = None
        self._directory, self._signals, self._tell = directory, signals, tell
        self._first = jax.process_index() == 0
        self._agreement = Agreement() if jax.process_count() > 1 else None
        self._looked, self._looked_at, self._look_at = time.monotonic(), 0, 0
        self._save_at: int | None = None
        self._trace_until: int | None = None
        self._tracing = False
        self._stuck: set[str] = set()
        self._failing = False
        self._seen = _Watch(directory) if is_remote(directory) and self._first else None
        self._traces: Path | None = None

    def stop_due(self, step: int) -> bool:
        """Whether the run ends after this step; called once per step, after its dispatch."""
        if self._agreement is None:
            reason, save = _NUMBERS[self._signals.reason], False
            if time.monotonic() - self._looked >= _SECONDS:
                self._looked = time.monotonic()
                reason, save = max(reason, self._stop_asked()), self._is_there(SAVE)
                self._begin_trace(step)
            self._obey(step, reason, save)
            return self.reason is not None
        told = self._agreement.read()
        if told is not None:
            reason, save, wait = told
            self._look_at = step - 1 + wait
            self._obey(step, reason, bool(save))
        if self.reason is None and step >= self._look_at:
            self._agreement.ask(max(_NUMBERS[self._signals.reason], self._stop_asked()), self._is_there(SAVE),
                                self._steps_to_wait(step))
            self._begin_trace(step)
        return self.reason is not None

    def save_due(self, step: int) -> bool:
        """Whether a checkpoint of this step was requested."""
        return self._save_at == step

    def trace_hooks(self) -> tuple[Hook, Hook]:
        """The hooks that start and stop a trace; the stopping hook runs before all others, the starting hook after
        them."""
        return (Hook(lambda step, state: self._start(step),
                     lambda step: self._trace_until == step + PROFILED_STEPS and not self._tracing),
                Hook(lambda step, state: self.end_trace(step), lambda step: self._trace_until == step))

    def end_trace(self, step: int) -> None:
        """Stop a running trace."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            place = self._directory / TRACES
            if self._traces is not None:
                try:
                    upload_tree(self._traces, place)
                except OSError as error:
                    log.warning("the trace cannot be copied to %s (%s)", place, error)
                    place = self._traces
            self._tell(step, f"the trace is in {place} (tensorboard, xprof or ui.perfetto.dev)")

    def close(self, step: int) -> None:
        """Stop a running trace, and the thread that checks for files."""
        try:
            self.end_trace(step)
        finally:
            if self._seen is not None:
                self._seen.close()

    def _obey(self, step: int, reason: int, save: bool) -> None:
        if save:
            self._save_at = step
            self._remove(SAVE)
            self._tell(step, f"{SAVE}: keeping step {step:,}")
        if reason:
            self.reason = _NAMES[reason]
            self._remove(STOP)
            why = {"stopped": STOP, "interrupted": "Ctrl-C", "preempted": "preempted"}[self.reason]
            self._tell(step, f"{why}: stopping after step {step:,}, and saving it")

    def _start(self, step: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every Python call: ten times the file, and slower steps
        if is_remote(self._directory):
            self._traces = Path(tempfile.mkdtemp(prefix="ctllm-profile-"))
        jax.profiler.start_trace(str(self._traces or self._directory / TRACES), profiler_options=options)
        self._tracing = True
        self._tell(step, f"{PROFILE}: tracing {PROFILED_STEPS} steps from step {step + 1:,} on")

    def _begin_trace(self, step: int) -> None:
        if not self._tracing and self._is_there(PROFILE):
            self._remove(PROFILE)
            self._trace_until = step + PROFILED_STEPS

    def _stop_asked(self) -> int:
        return _NUMBERS["stopped"] * self._is_there(STOP)

    def _is_there(self, name: str) -> bool:
        if not self._first or name in self._stuck:
            return False
        if self._seen is not None:
            return name in self._seen.names
        try:
            found, self._failing = (self._directory / name).exists(), False
            return found
        except OSError as error:  # a file server that is briefly unavailable
            if not self._failing:
                log.warning("%s cannot be looked for (%s); this is tried again", self._directory / name, error.strerror)
            self._failing = True
            return False

    def _remove(self, name: str) -> None:
        if not self._is_there(name):
            return
        try:
            with told(self._directory):
                (self._directory / name).unlink(missing_ok=True)
            if self._seen is not None:
                self._seen.names.discard(name)
        except OSError as error:
            self._stuck.add(name)
            log.warning("%s was obeyed, cannot be removed (%s), and is not looked for again", self._directory / name,
                        error.strerror)

    def _steps_to_wait(self, step: int) -> int:
        """Number of steps per second."""
        now = time.monotonic()
        rate = (step - self._looked_at) / max(now - self._looked, 1e-6) if self._looked_at else 0.0
        self._looked, self._looked_at = now, step
        return int(min(max(rate * _SECONDS, 1), _MOST_STEPS))


class _Watch:
    """The latest listing of a directory of an object store, made by a thread.

    No error ends the thread, because a later STOP would then never be seen. Of consecutive errors, the first is logged.
    """

    def __init__(self, directory: Path):
        self.names: set[str] = set()
        self._directory, self._ended = directory, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="requests")
        self._thread.start()

    def close(self) -> None:
        """End the thread, before Python's shutdown removes the client that it uses."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        failing = False
        while True:
            try:
                self.names = {STOP, SAVE, PROFILE}.intersection(list_names(self._directory))
                failing = False
            except Exception as error:
                if not failing:
                    log.warning("%s, %s and %s cannot be looked for in %s (%s: %s); this is tried again every %g s",
                                STOP, SAVE, PROFILE, self._directory, type(error).__name__, error, _REMOTE_SECONDS)
                failing = True
            if self._ended.wait(_REMOTE_SECONDS):
                return


class Agreement:
    """An exchange of a few numbers between all processes: sent at one step, read at the next one.

    All processes send and read at the same steps. One device of each process takes part.
    """

    def __init__(self) -> None:
        firsts: dict[int, jax.Device] = {}
        for device in jax.devices():
            firsts.setdefault(device.process_index, device)
        mesh = Mesh(np.array([firsts[index] for index in sorted(firsts)]), ("process",))
        self._shape = (len(firsts), 3)
        self._in = NamedSharding(mesh, PartitionSpec("process"))
        self._largest = jax.jit(lambda x: x.max(0), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._asked: jax.Array | None = None
        self.ask(0, False, 1)  # compile it before the first step
        self.read()

    def ask(self, reason: int, save: bool, wait: int) -> None:
        """Send this process's numbers; returns at once."""
        mine = np.array([[reason, save, -wait]], np.int32)
        self._asked = self._largest(jax.make_array_from_process_local_data(self._in, mine, self._shape))

    def read(self) -> tuple[int, int, int] | None:
        """The largest reason, whether any process requests a save, the shortest wait; None if nothing was sent."""
        if self._asked is None:
            return None
        reason, save, wait = np.asarray(self._asked).tolist()
        self._asked = None
        return reason, save, -wait
