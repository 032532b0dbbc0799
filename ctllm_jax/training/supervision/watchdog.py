"""End a run that hangs or has lost a process: with a message, every thread's stack, and the exit status for a requeue.

Two threads watch, and neither waits for a device, a peer or the other thread. The first polls whether the metrics of
running steps are ready, which never blocks. The second touches a file in RUN/processes as a heartbeat. While no step
finishes, it checks only the heartbeat of the next process, and reads RUN/processes/lost, where a process that misses
its neighbor writes its findings. So the work per process does not grow with the number of processes.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import jax

from ctllm_jax.config.reliability import WatchdogConfig
from ctllm_jax.config.statuses import REQUEUE
from ctllm_jax.storage import is_remote
from ctllm_jax.training.supervision.goodput import STEPPING, Ledger

log = logging.getLogger(__name__)
PROCESSES = "processes"
LOST = "lost"
"""File in that folder: JSON with the findings of the first process that missed another one."""
_OF_RUNTIME = re.compile("(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")
"""Beginnings of error texts from JAX's runtime. If a library other than JAX, such as numpy, requested the result, such
an error is a ValueError."""
_LEAST_SECONDS, _MEDIANS = 300.0, 10
_POLL = 0.5
_NOTICED = 0.75
"""Share of `distributed.heartbeat_seconds` after which a silent process is named, so that all processes end within that
time."""
_MARGIN = 5.0
_LAST_WORDS = 30.0
"""Time limit in seconds for recording the end, because the disk itself may hang."""
_LAST_OUT = 3.0
"""Seconds that the first process waits for the others to end, because they abort without its JAX coordinator."""


class Watchdog:
    """Watches from `__enter__` to `__exit__`; all methods may be called from the main thread at any time.

    Args:
      config: the time limits.
      heartbeat_seconds: time after which a silent peer counts as lost.
      directory: the run directory.
      ledger: the current phase of the main thread.
      tell: `(reason, message)`, called on the thread that ends the process, with the reason `hung` or `lost a process`.
    """

    def __init__(self, config: WatchdogConfig, *, heartbeat_seconds: float, directory: Path, ledger: Ledger,
                 tell: Callable[[str, str], None]):
        self._config, self._heartbeat, self._directory = config, heartbeat_seconds, directory
        self._ledger, self._tell = ledger, tell
        self._index, self._count = jax.process_index(), jax.process_count()
        self._status = REQUEUE
        self._on_their_way: deque[tuple[int, Any]] = deque()
        self._durations: deque[float] = deque(maxlen=64)
        self._sign = self._finished_at = time.monotonic()
        self._finished: int | None = None
        self._done, self._ending = threading.Event(), threading.Lock()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        self._sign = time.monotonic()
        if self._config.seconds != 0:
            self._start(self._watch_steps, "watchdog")
        # File times on an object store cannot serve as heartbeats; there JAX's own heartbeat ends a run, without naming
        # the lost process.
        if self._count > 1 and not is_remote(self._directory):
            self._start(self._watch_peers, "heartbeat")
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def dispatched(self, step: int, metrics: dict[str, Any]) -> None:
        """Note that a step was dispatched to the devices."""
        self._on_their_way.append((step, metrics["loss"]))

    def beat(self) -> None:
        """A sign of life in a slow phase."""
        self._sign = time.monotonic()

    def leave(self, status: int) -> None:
        """Note that this process ends by itself with this status; the others then end with the same status."""
        if self._count > 1 and not is_remote(self._directory):
            with suppress(OSError):
                self._write_sign(ended=status)

    def await_verdict(self, error: BaseException) -> None:
        """After an error that a lost peer may have caused, wait until the loss would be detected; if so, the process
        ends here."""
        if self._count > 1 and (isinstance(error, jax.errors.JaxRuntimeError) or _OF_RUNTIME.match(str(error))):
            log.error("%s: waiting for %.0f s to see whether another process is gone", str(error).splitlines()[0],
                      self._heartbeat + _MARGIN)
            time.sleep(self._heartbeat + _MARGIN)

    @property
    def limit(self) -> float:
        """Seconds without a sign of life that are too long now."""
        if self._ledger.current not in STEPPING or self._finished is None:
            return self._config.slow_seconds
        if self._config.seconds is not None:
            return self._config.seconds
        typical = median(self._durations) if self._durations else 0.0
        return max(_LEAST_SECONDS, _MEDIANS * typical)

    def idle(self) -> float:
        """Seconds since the last sign of life."""
        return time.monotonic() - max(self._sign, self._ledger.turned)

    def _start(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, daemon=True, name=name)
        thread.start()
        self._threads.append(thread)

    def _watch_steps(self) -> None:
        while not self._done.wait(_POLL):
            self._look_for_finished()
            idle, limit = self.idle(), self.limit
            if idle > limit:
                last = "none was made before" if self._finished is None else f"the last was step {self._finished:,}"
                self._end("hung", f"no step was finished for {idle:.0f} s (watchdog: {limit:.0f} s in phase"
                                  f" {self._ledger.current}); {last}")

    def _look_for_finished(self) -> None:
        finished = None
        while self._on_their_way and self._on_their_way[0][1].is_ready():
            finished = self._on_their_way.popleft()[0]
        if finished is None:
            return
        now = time.monotonic()
        if self._finished is not None and finished > self._finished:
            self._durations.append((now - self._finished_at) / (finished - self._finished))
        self._finished, self._finished_at, self._sign = finished, now, now

    def _watch_peers(self) -> None:
        folder, began = self._directory / PROCESSES, None
        mine = folder / str(self._index)
        while not self._done.is_set():
            try:
                if began is None:
                    written = self._write_sign().stat().st_mtime
                    if self._index == 0:
                        # Written now, and empty: a network disk may remember for a minute that a file is absent.
                        (folder / LOST).write_text("")
                    began = written
                if self._done.wait(self._heartbeat / 10):
                    return
                os.utime(mine)
                # While steps are made all are alive.
                gone = self._lost(folder, mine, began=began) if self.idle() > _NOTICED * self._heartbeat / 2 else []
            except (OSError, ValueError) as error:  # a sign may be half written
                log.warning("no sign of life could be given or looked for in %s: %s", folder, error)
                self._done.wait(self._heartbeat / 10)
                continue
            if gone:
                self._end("lost a process", "; ".join(gone))

    def _write_sign(self, **more: Any) -> Path:
        mine = self._directory / PROCESSES / str(self._index)
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), **more}))
        return mine

    def _lost(self, folder: Path, mine: Path, *, began: float) -> list[str]:
        """The message about lost processes: from another process's findings, or from this one's when the next process,
        of which it alone looks for signs, gives none. Only then does it look at all of them."""
        with suppress(FileNotFoundError, ValueError), open(folder / LOST, encoding="utf-8") as file:
            text = file.read()
            if text and os.fstat(file.fileno()).st_mtime >= began:
                told = json.loads(text)
                self._status = told["status"]
                return told["lost"]
        following = folder / str((self._index + 1) % self._count)
        if not self._is_silent(following, now=mine.stat().st_mtime, began=began):
            return []
        if gone := self._silent(folder, mine, began=began):
            (folder / LOST).write_text(json.dumps({"lost": gone, "status": self._status}))
        return gone

    def _is_silent(self, path: Path, *, now: float, began: float) -> bool:
        """Whether a process gave a heartbeat in this attempt, but none for too long."""
        try:
            sign = path.stat().st_mtime
        except FileNotFoundError:
            return False
        return sign >= began and now - sign > _NOTICED * self._heartbeat

    def _silent(self, folder: Path, mine: Path, *, began: float) -> list[str]:
        """Describe each silent process. Times are those of the disk, which has one clock. A file from before `began`
        belongs to an earlier attempt; its process has not started yet."""
        now, found = mine.stat().st_mtime, []
        for index in range(self._count):
            path = folder / str(index)
            if index != self._index and self._is_silent(path, now=now, began=began):
                silent = now - path.stat().st_mtime
                known = json.loads(path.read_text() or "{}")
                if known.get("ended") not in (None, REQUEUE):
                    self._status = known["ended"]  # a status that the process chose itself counts for all
                found.append(f"process {index} (of {self._count}, on {known.get('host')}, pid {known.get('pid')}) has"
                             f" given no sign of life for {silent:.0f} s")
        return found

    def _end(self, reason: str, what: str) -> None:
        """End this process, on the thread that noticed first."""
        with self._ending:
            if self._done.is_set():
                return
            # This process ends even if something hangs, including the disk.
            last = threading.Timer(_LAST_WORDS, os._exit, (self._status,))
            last.daemon = True
            last.start()
            message = f"process {self._index} on {socket.gethostname()}: {what}"
            # Not on an object store, which may itself hang.
            folder = Path(tempfile.mkdtemp(prefix="ctllm-")) if is_remote(self._directory) else self._directory
            path = folder / f"stacks-{self._index}.txt"
            sys.stderr.write(f"{message}; every thread's stack follows, and is in {path}\n")
            sys.stderr.flush()
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            try:
                with open(path, "w", encoding="utf-8") as file:
                    file.write(f"{message}\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
            except OSError as error:
                sys.stderr.write(f"{path} could not be written: {error}\n")
            try:
                self._tell(reason, message)
            except Exception as error:
                sys.stderr.write(f"the end could not be recorded: {type(error).__name__}: {error}\n")
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                if self._index == 0 and self._count > 1:
                    time.sleep(_LAST_OUT)
                os._exit(self._status)
