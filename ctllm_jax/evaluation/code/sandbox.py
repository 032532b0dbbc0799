"""Run model-written programs in a sandbox.

Each program runs in its own process (`python -I`) with an empty environment and limits on CPU time, wall time, memory,
output and files. seccomp allows only a list of system calls, and prevents new processes, sockets and signals. The
program can access only Python's own files and one directory. This is enforced by new mount, process, network and user
namespaces if users may create them; the directory is then a file system in memory. Otherwise Landlock enforces it; then
the directory is temporary and deleted afterwards, a program that makes too many files is stopped, and only the time
limit bounds the sum of their sizes. The program has no capabilities, even if root starts it. A machine with neither
runs no programs.

It protects against accidents and typical model-written code, not against an attacker with a kernel exploit. A program
that searches its interpreter for the string that marks success can find it.
"""

from __future__ import annotations

import functools
import json
import logging
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

log = logging.getLogger(__name__)
Isolation = Literal["namespaces", "landlock"]
_CHILD = Path(__file__).with_name("sandbox_child.py")
_MEMORY_MARGIN = 64 << 20  # of the interpreter itself
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CENSUS_SECONDS = 0.1
MAX_ENTRIES, MAX_DEPTH = 1024, 64
"""Limits on files and folders at a time, and on folder depth, because removing one may take milliseconds on a disk."""


@dataclass(frozen=True)
class Limits:
    """Resource limits of one program."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 6
    memory_bytes: int = 1 << 30
    """Of address space."""
    file_bytes: int = 16 << 20
    """Size limit of one file; with namespaces, all files together may have twice that."""
    output_bytes: int = 64 << 10
    """Limit of its output; a program that prints more is stopped."""


@dataclass(frozen=True)
class Outcome:
    """Result of a program."""

    status: Literal["passed", "failed", "timed out", "too much output", "too many files"]
    """passed: it ran to its last line. Time means wall or CPU time, whichever ended first."""
    output: str
    """Its output, including standard error, up to the limit."""
    seconds: float
    """Wall time, including the sandbox's own 0.1 s."""

    @property
    def passed(self) -> bool:
        """Whether the program ran to its last line."""
        return self.status == "passed"


def run_program(program: str, *, limits: Limits = Limits(), isolation: Isolation | None = None) -> Outcome:
    """Run one Python program to its end, or to a limit.

    Args:
      program: Python source; what a test asserts is part of it.
      limits: what it may use.
      isolation: the isolation method; None: the best that works here (`find_isolation`).

    Raises:
      UserError: no isolation works here.
      RuntimeError: this one does not.
    """
    isolation = isolation or find_isolation()
    token = secrets.token_hex(16)
    begin = time.monotonic()
    directory = tempfile.mkdtemp(prefix="sandbox-")
    try:
        # Pipes for the program's output, and for errors before it starts.
        (status_read, status_write), (setup_read, setup_write) = os.pipe(), os.pipe()
        try:
            child = subprocess.Popen([sys.executable, "-I", "-S", str(_CHILD)], stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment(directory),
                                     cwd="/", start_new_session=True, pass_fds=(status_write, setup_write))
        finally:
            os.close(status_write)
            os.close(setup_write)
        try:
            with child:
                job = _job(program, token, directory, limits, isolation, status_write, setup_write)
                stopped, output = _watch(child, json.dumps(job).encode(), limits, begin,
                                         directory if isolation == "landlock" else None)
                # Every process that could hold the pipes open has ended, so their content is complete.
                said, problem = os.read(status_read, 4096), os.read(setup_read, 4096)
        finally:
            os.close(status_read)
            os.close(setup_read)
        seconds = time.monotonic() - begin
    finally:
        remove_folder(directory)
    if problem:
        raise RuntimeError(f"the sandbox ({isolation}) does not work here: {problem.decode('utf-8', 'replace')}")
    if stopped is None and child.returncode == 128 + signal.SIGKILL and seconds >= limits.cpu_seconds:
        stopped = "timed out"
    passed = said == token.encode() and child.returncode == 0
    return Outcome(stopped or ("passed" if passed else "failed"), output.decode("utf-8", "replace"), seconds)


def run_programs(programs: Sequence[str], *, limits: Limits = Limits(), workers: int | None = None) -> list[Outcome]:
    """Run programs in parallel, at most `workers` at a time (None: one a processor), in their order."""
    isolation = find_isolation()
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda program: run_program(program, limits=limits, isolation=isolation), programs))


@functools.cache
def find_isolation() -> Isolation:
    """The best isolation that works on this machine, by trying it.

    Raises:
      UserError: there is none; the message names what each method lacks.
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


def remove_folder(folder: str) -> None:
    """Remove a folder with everything that a program made in it, at any depth and with any permissions.

    The time depends only on the number of entries: no path is resolved from the root, and nothing recurses.
    """
    above: list[str] = []
    here = os.open(folder, _FOLDER)
    try:
        while True:
            inside = _remove_entries(here)
            if inside is not None:
                os.chmod(inside, 0o700, dir_fd=here)
                below, name = os.open(inside, _FOLDER, dir_fd=here), None
                above.append(inside)
            elif above:
                below, name = os.open("..", _FOLDER, dir_fd=here), above.pop()
            else:
                break
            os.close(here)
            here = below
            if name is not None:
                os.rmdir(name, dir_fd=here)
        os.rmdir(folder)
    except OSError as error:
        log.warning("what a program left in %s could not be removed: %s", folder, error)
    finally:
        os.close(here)


def _remove_entries(here: int) -> str | None:
    """Remove files and empty folders; the first folder that is not empty, or None when all are gone."""
    removed = True
    while removed:  # until a listing is empty: entries that go while it is read may hide others
        removed = False
        with os.scandir(here) as entries:
            for entry in entries:
                removed = True
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=here)
                    continue
                try:
                    os.rmdir(entry.name, dir_fd=here)
                except OSError:
                    return entry.name
    return None


def _job(program: str, token: str, directory: str, limits: Limits, isolation: str, status: int, setup: int) -> dict:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return {
        "program": program, "token": token, "directory": directory, "isolation": isolation, "status_fd": status,
        "setup_fd": setup, "entries": MAX_ENTRIES,
        "python": sys.executable, "environment": _environment(directory), "readable": _readable(),
        "wall_seconds": limits.wall_seconds, "disk_bytes": 2 * limits.file_bytes,
        "limits": {"RLIMIT_CPU": limits.cpu_seconds, "RLIMIT_AS": limits.memory_bytes + _MEMORY_MARGIN,
                   "RLIMIT_FSIZE": limits.file_bytes, "RLIMIT_CORE": 0,
                   "RLIMIT_NOFILE": 64 if hard == resource.RLIM_INFINITY else min(64, hard)},
    }


def _environment(directory: str) -> dict[str, str]:
    """An environment without our variables; one thread for numerical libraries, because a thread's stack counts as
    memory."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {**kept, "PATH": "/usr/bin:/bin", "HOME": directory, "TMPDIR": directory, "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def _readable() -> list[str]:
    """The folders of Python and the system's libraries."""
    own = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values(),
           os.path.dirname(os.path.realpath(sys.executable))}
    system = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/nix/store")
    libraries = [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path]
    return sorted({path for path in (*own, *system, *libraries) if os.path.exists(path)})


def _watch(child: subprocess.Popen, job: bytes, limits: Limits, begin: float,
           directory: str | None) -> tuple[str | None, bytes]:
    """Send the job, collect output, and stop the group at a limit; returns the reason of the stop (or None) and the
    output.

    `directory` is the directory whose entries are counted; None: its file system limits them.
    """
    deadline, census = begin + limits.wall_seconds, begin
    output, stopped, reading = bytearray(), None, True
    try:
        try:
            child.stdin.write(job)
            child.stdin.close()
        except BrokenPipeError:
            pass  # it ended before it read; the status pipe says why
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while stopped is None:
                now = time.monotonic()
                if directory is not None and now >= census:
                    census = now + _CENSUS_SECONDS
                    if has_too_many_entries(directory):
                        stopped = "too many files"
                        break
                wait = max(min(deadline, census if directory is not None else deadline) - now, 0)
                if not reading:  # it closed its output, and may continue
                    try:
                        child.wait(wait)
                        break
                    except subprocess.TimeoutExpired:
                        stopped = "timed out" if time.monotonic() >= deadline else None
                elif selector.select(wait):
                    chunk = os.read(child.stdout.fileno(), 65536)
                    reading = bool(chunk)
                    output += chunk[:limits.output_bytes - len(output)]
                    if len(output) >= limits.output_bytes:
                        stopped = "too much output"
                elif time.monotonic() >= deadline:
                    stopped = "timed out"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return stopped, bytes(output)


def has_too_many_entries(folder: str) -> bool:
    """Whether a folder holds more than MAX_ENTRIES files and folders, or some more than MAX_DEPTH levels down."""
    left = MAX_ENTRIES

    def count(here: int, depth: int) -> bool:
        nonlocal left
        with os.scandir(here) as entries:
            for entry in entries:
                left -= 1
                if left < 0 or depth > MAX_DEPTH:
                    return True
                if entry.is_dir(follow_symlinks=False) and look(entry.name, here, depth + 1):
                    return True
        return False

    def look(name: str, above: int | None, depth: int) -> bool:
        try:
            opened = os.open(name, _FOLDER, dir_fd=above)
        except OSError:  # the program has removed or closed it since
            return False
        try:
            return count(opened, depth)
        finally:
            os.close(opened)

    return look(folder, None, 1)
