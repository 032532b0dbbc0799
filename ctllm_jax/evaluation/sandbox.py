"""Programs that a model wrote, run where they can do no harm.

Each program has a process of its own (`python -I`) with an empty environment, limits on processor time, wall time,
memory, output and files, and no way to make processes, open sockets or signal others (seccomp). Files are closed to it
but for Python's own and a directory of its own, by new mount, process, network and user namespaces where the machine
lets a user have them (a file system in memory, gone with the program), else by Landlock (a temporary directory that is
deleted afterwards; the sum of its files is bounded by time alone). A machine with neither runs nothing.

It is made for accidents and for what models write, not for a determined attacker with a kernel exploit; and a program
that searches its interpreter for the word that says it passed can find it.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import secrets
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ctllm_jax.config.errors import UserError

Isolation = Literal["namespaces", "landlock"]
_CHILD = Path(__file__).with_name("sandbox_child.py")
_MEMORY_MARGIN = 64 << 20  # of the interpreter itself


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 6
    memory_bytes: int = 1 << 30
    """Of address space."""
    file_bytes: int = 16 << 20
    """Of one file; with namespaces of all files together twice that."""
    output_bytes: int = 64 << 10
    """Of what it prints; a program that prints more is stopped."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    status: Literal["passed", "failed", "timed out", "too much output"]
    """passed: it ran to its last line. Time is wall or processor time, whichever ended first."""
    output: str
    """What it printed, standard error included, up to the limit."""
    seconds: float
    """Wall time, the sandbox's own 0.1 s included."""

    @property
    def passed(self) -> bool:
        """Whether the program ran to its last line."""
        return self.status == "passed"


def run_program(program: str, *, limits: Limits = Limits(), isolation: Isolation | None = None) -> Outcome:
    """Run one Python program to its end, or to a limit.

    Args:
      program: Python source; what a test asserts is part of it.
      limits: what it may use.
      isolation: how files and processes are kept from it; None: the best that works here (`find_isolation`).

    Raises:
      UserError: no isolation works here.
      RuntimeError: this one does not.
    """
    isolation = isolation or find_isolation()
    token = secrets.token_hex(16)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as directory:
        status_read, status_write = os.pipe()
        try:
            child = subprocess.Popen([sys.executable, "-I", "-S", str(_CHILD)], stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment(directory),
                                     cwd="/", start_new_session=True, pass_fds=(status_write,))
        finally:
            os.close(status_write)
        try:
            with child:
                job = _job(program, token, directory, limits, isolation, status_write)
                stopped, output = _watch(child, json.dumps(job).encode(), limits, begin)
                # All that could hold the pipe open is dead: what it says is there, or nothing.
                said = os.read(status_read, 4096).decode("utf-8", "replace")
        finally:
            os.close(status_read)
    seconds = time.monotonic() - begin
    if said.startswith("setup: "):
        raise RuntimeError(f"the sandbox ({isolation}) does not work here: {said.removeprefix('setup: ')}")
    if stopped is None and child.returncode == 128 + signal.SIGKILL and seconds >= limits.cpu_seconds:
        stopped = "timed out"
    passed = said == token and child.returncode == 0
    return Outcome(stopped or ("passed" if passed else "failed"), output.decode("utf-8", "replace"), seconds)


def run_programs(programs: Sequence[str], *, limits: Limits = Limits(), workers: int | None = None) -> list[Outcome]:
    """Run programs beside each other, at most `workers` at a time (None: one a processor), in their order."""
    isolation = find_isolation()
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda program: run_program(program, limits=limits, isolation=isolation), programs))


@functools.cache
def find_isolation() -> Isolation:
    """The best isolation that works on this machine, by trying it.

    Raises:
      UserError: there is none; the message names what each lacks.
    """
    reasons = []
    if sys.platform == "linux":
        for isolation in ("namespaces", "landlock"):
            try:
                if (outcome := run_program("", isolation=isolation)).passed:
                    return isolation
                reasons.append(f"{isolation}: an empty program {outcome.status}: {outcome.output.strip()[-300:]}")
            except RuntimeError as error:
                reasons.append(str(error))
    raise UserError("code of a model is run in a sandbox only, and this machine has none: "
                    + ("; ".join(reasons) or f"{sys.platform} is not Linux")
                    + ". It takes user namespaces (sysctl user.max_user_namespaces) or Landlock (Linux 5.13) with "
                      "seccomp")


def _job(program: str, token: str, directory: str, limits: Limits, isolation: str, status: int) -> dict:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return {
        "program": program, "token": token, "directory": directory, "isolation": isolation, "status_fd": status,
        "python": sys.executable, "environment": _environment(directory), "readable": _readable(),
        "wall_seconds": limits.wall_seconds, "disk_bytes": 2 * limits.file_bytes,
        "limits": {"RLIMIT_CPU": limits.cpu_seconds, "RLIMIT_AS": limits.memory_bytes + _MEMORY_MARGIN,
                   "RLIMIT_FSIZE": limits.file_bytes, "RLIMIT_CORE": 0,
                   "RLIMIT_NOFILE": 64 if hard == resource.RLIM_INFINITY else min(64, hard)},
    }


def _environment(directory: str) -> dict[str, str]:
    """Nothing of ours; one thread for numerical libraries, since a thread's stack counts as memory."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {**kept, "PATH": "/usr/bin:/bin", "HOME": directory, "TMPDIR": directory, "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def _readable() -> list[str]:
    """Where Python and the system's libraries are."""
    own = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values(),
           os.path.dirname(os.path.realpath(sys.executable))}
    system = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/nix/store")
    libraries = [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path]
    return sorted({path for path in (*own, *system, *libraries) if os.path.exists(path)})


def _watch(child: subprocess.Popen, job: bytes, limits: Limits, begin: float) -> tuple[str | None, bytes]:
    """Hand over the job, gather output, stop the group at a limit; why it was stopped (or None), and the output."""
    deadline = begin + limits.wall_seconds
    output, stopped = bytearray(), None
    try:
        try:
            child.stdin.write(job)
            child.stdin.close()
        except BrokenPipeError:
            pass  # it ended before it read; the status pipe says why
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    stopped = "timed out"
                    break
                chunk = os.read(child.stdout.fileno(), 65536)
                if not chunk:
                    break
                output += chunk[:limits.output_bytes - len(output)]
                if len(output) >= limits.output_bytes:
                    stopped = "too much output"
                    break
        if stopped is None:
            try:
                child.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:  # it closed its output and goes on
                stopped = "timed out"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return stopped, bytes(output)
