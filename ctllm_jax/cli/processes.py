"""`processes=N`: a training command in several processes of this machine, as one.

Each has its own GPU, or its part of the CPU devices. The first one speaks; what the others say of an error is shown
when they end by it. Signals reach all of them, and when one dies the others end.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctllm_jax.cluster import distributed
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.statuses import DIVERGED, DONE, INTERRUPTED, REQUEUE, WRONG_INPUT

if TYPE_CHECKING:
    from ctllm_jax.cli import Context

_CHILD = "from ctllm_jax.cli.processes import be_child; be_child()"
_PROGRAM = "CTLLM_PROGRAM"
"""Environment variable: what the parent was started as, for the commands in its children's messages."""
_DEVICES = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
_AGREED = (DONE, WRONG_INPUT, DIVERGED, REQUEUE, INTERRUPTED)
_GRACE, _SHORT_GRACE = 60.0, 5.0
"""Seconds that the others have when one ended with such a status (they are about to do the same), or with another."""
_LINES = 60


def run_in_processes(context: Context) -> int | None:
    """The exit status of all processes of the command; None if the command continues in this process.

    Raises:
      UserError: somebody else started several processes already, or the devices cannot be shared so.
    """
    wanted = context.config.processes
    if wanted == 1 or context.dry_run:
        return None
    launch = distributed.detect(os.environ)
    if launch.kind == "explicit" and launch.processes == wanted:
        return None
    if launch.processes > 1:
        raise UserError(f"processes={wanted} starts processes on this machine, and this is one of several already "
                        f"({launch.describe()}): leave it out")
    words = [context.command, *context.targets, *context.overrides]
    with Processes(words, share_devices(os.environ, wanted)) as processes:
        return processes.wait()


def share_devices(environment: Mapping[str, str], processes: int) -> list[dict[str, str]]:
    """The environment variables of each process: its rank, and its devices.

    Raises:
      UserError: more processes than GPUs, CPU devices that the number does not divide, or TPUs.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    own = [{"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index)} for index in range(processes)]
    gpus = distributed.count_gpus(environment)
    if distributed.on_tpu_vm(environment):
        raise UserError(f"processes={processes}: a machine with TPUs runs one process, which has all of its chips")
    if gpus:
        if processes > gpus:
            raise UserError(f"processes={processes}: each has a GPU, and there are {gpus} here")
        return [each | {"JAX_LOCAL_DEVICE_IDS": str(index)} for index, each in enumerate(own)]
    flags = environment.get("XLA_FLAGS", "")
    if found := _DEVICES.findall(flags):
        devices = int(found[-1])  # the last one counts for XLA, too
        if devices % processes:
            raise UserError(f"processes={processes} does not divide the {devices} CPU devices of XLA_FLAGS")
        flags = _DEVICES.sub(f"--xla_force_host_platform_device_count={devices // processes}", flags)
    return [each | {"XLA_FLAGS": flags} for each in own]


def start_child(words: Sequence[str], *, environment: Mapping[str, str] | None = None,
                **options: Any) -> subprocess.Popen:
    """Start a command in its own process group, so that a terminal's Ctrl-C reaches it only once, through this process.

    `environment` has additional variables; other options are Popen's.
    """
    root = str(Path(__file__).resolve().parent.parent.parent)
    environment = {**os.environ, _PROGRAM: sys.argv[0], **(environment or {})}
    paths = [root, *filter(None, [environment.get("PYTHONPATH")])]
    return subprocess.Popen([sys.executable, "-c", _CHILD, str(os.getpid()), *words], process_group=0,
                            env={**environment, "PYTHONPATH": os.pathsep.join(paths)}, **options)


def be_child() -> None:
    """In the child process: run the command whose words follow the parent's process id.

    Should the parent be killed, the command ends as with Ctrl-C (on Linux), so that the same one again does not meet
    it.
    """
    import ctypes

    from ctllm_jax.cli import entry

    parent = int(sys.argv.pop(1))
    sys.argv[0] = os.environ.get(_PROGRAM, "launch.py")
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGINT))  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            sys.exit(INTERRUPTED)
    entry()


def shell_status(returncode: int) -> int:
    """The exit status of a process as a shell gives it."""
    return 128 - returncode if returncode < 0 else returncode


class Processes:
    """The processes of one command, from their start to the end of the last; a context manager."""

    def __init__(self, words: Sequence[str], environments: Sequence[Mapping[str, str]]):
        self._words, self._environments = words, environments
        self._processes: list[subprocess.Popen] = []
        self._ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._said: list[deque[str]] = []
        self._threads: list[threading.Thread] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Processes:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._forward)
        for index, environment in enumerate(self._environments):
            quiet = {} if index == 0 else {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True,
                                           "errors": "replace"}
            process = start_child(self._words, environment=environment, **quiet)
            self._processes.append(process)
            self._said.append(deque(maxlen=_LINES))
            thread = threading.Thread(target=self._follow, args=(index, process), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for thread in self._threads:
            thread.join()
        for number, before in self._before.items():
            signal.signal(number, before)

    def wait(self) -> int:
        """Wait until all have ended; print the output of the first that failed, and return its status."""
        statuses: dict[int, int] = {}
        worst, grace = DONE, None
        while len(statuses) < len(self._processes):
            try:
                index, status = self._ended.get(timeout=grace)
            except queue.Empty:
                alive = [process for process in self._processes if process.poll() is None]
                print(f"{len(alive)} of {len(self._processes)} processes did not end with the others, and are killed",
                      file=sys.stderr)
                for process in alive:
                    process.kill()
                grace = None
                continue
            statuses[index] = status
            worst = worst or status
            grace = _GRACE if status in _AGREED else _SHORT_GRACE
        for index, status in statuses.items():
            # The first process has already reported wrong input.
            told = (DONE, DIVERGED, REQUEUE, INTERRUPTED, *[WRONG_INPUT] * (statuses[0] == WRONG_INPUT))
            if index and status not in told:
                said = "".join(self._said[index]).rstrip()
                print(f"process {index} ended with status {status}, and said at last:\n{said or 'nothing'}",
                      file=sys.stderr)
        return worst

    def _follow(self, index: int, process: subprocess.Popen) -> None:
        if process.stderr is not None:
            with process.stderr:
                self._said[index].extend(process.stderr)
        self._ended.put((index, shell_status(process.wait())))

    def _forward(self, number: int, frame: Any) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)
