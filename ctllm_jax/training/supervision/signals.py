"""Signals to a run: the first one stops it after a step, which is saved; a second one ends the process at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from ctllm_jax.config.statuses import DONE, INTERRUPTED, REQUEUE

log = logging.getLogger(__name__)
REASONS = {"stopped": DONE, "interrupted": INTERRUPTED, "preempted": REQUEUE}
"""Reasons why a run ends before its last step, with the exit status; of several reasons, the last in this order
counts."""
_NUMBERS = {signal.SIGINT: "interrupted", signal.SIGTERM: "preempted", signal.SIGUSR1: "preempted"}
_ONE_NOTICE = 2.0
"""Seconds within which a second SIGTERM or SIGUSR1 counts as a repetition, because a scheduler signals a job and its
steps."""
_AT_ONCE = 3.0
"""Seconds after which a process that must end at once is killed, even if it waits."""


class Stopped(SystemExit):
    """A run ended before its last step, for one of REASONS; `code` is the exit status."""

    def __init__(self, reason: str):
        super().__init__(REASONS[reason])
        self.reason = reason


class Signals:
    """Ctrl-C, SIGTERM and SIGUSR1, as a context manager; entered after `jax.distributed.initialize`.

    After `begin`, the first signal is only noted. Before, there is nothing to save, and a signal ends the process at
    once. A second signal always ends it at once: `Stopped` (Ctrl-C: KeyboardInterrupt) is raised in the main thread,
    and if that waits for a compiler or a lost peer, another thread ends the process. With several processes, SIGTERM
    and SIGUSR1 are only noted from the start, because the others would wait for an ended process without a reason.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._message: Callable[[str], None] = log.warning
        self._noted: set[int] = set()
        self._first = 0.0
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._fd_before = -1

    def begin(self, message: Callable[[str], None]) -> None:
        """From now on a signal stops the run after a step; `message` informs the user."""
        self._message, self._noted = message, set(_NUMBERS)

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self
        if jax.process_count() > 1:
            self._noted = {signal.SIGTERM, signal.SIGUSR1}
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._fd_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        # Ignored signals stay ignored: a script's & ignores Ctrl-C.
        self._before = {number: signal.signal(number, self._handle) for number in _NUMBERS
                        if signal.getsignal(number) is not signal.SIG_IGN}
        threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True, name="signals").start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, before in self._before.items():
            # None: the handler was not Python's, but that of the distributed runtime, which is not needed any more.
            signal.signal(number, before if before is not None else signal.SIG_DFL)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._fd_before)
            os.close(self._pipe[1])
            self._pipe = None

    def _handle(self, number: int, frame: Any) -> None:
        """Runs in the main thread, when it next executes Python code."""
        now, first = time.monotonic(), not self._first
        if not first and number != signal.SIGINT and now - self._first < _ONE_NOTICE:
            return
        self._first = self._first or now
        reason = _NUMBERS[signal.Signals(number)]
        self.reason = max(filter(None, (self.reason, reason)), key=list(REASONS).index)
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if first and number in self._noted:
            self._message(f"{name}: the run stops after a step, and saves it; a second {name} stops it at once")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self._message(f"{name}: ending at once; the same command continues from the last checkpoint")
            raise Stopped(reason)

    def _watch(self, pipe: int) -> None:
        """Runs in a separate thread; ends the process if the main thread cannot because it waits."""
        first = 0.0
        with open(pipe, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] not in self._before:
                    continue
                same = number[0] != signal.SIGINT and time.monotonic() - first < _ONE_NOTICE
                if number[0] in self._noted if not first else same:
                    first = first or time.monotonic()
                    continue
                time.sleep(_AT_ONCE)
                os._exit(REASONS[_NUMBERS[signal.Signals(number[0])]])
