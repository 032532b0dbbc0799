"""The owner of a run directory, as recorded in its lock: a process, its machine, and whether it is alive."""

from __future__ import annotations

import json
import os
import shlex
import socket
from datetime import datetime
from pathlib import Path
from typing import Any

from ctllm_jax.storage import is_remote


def whoami() -> dict[str, Any]:
    """The lock entry of this process."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "place": _place(), "pid": pid, "started": _started(pid),
            "job": os.environ.get("SLURM_JOB_ID")}


def _place() -> str:
    """The scope of a process id: one boot and one PID namespace of one machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """Start time of a process in the kernel's ticks, which distinguishes processes that reuse an id."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie does nothing any more


def is_gone(owner: dict[str, Any]) -> bool | None:
    """Whether an owner on this machine has ended; None: it is on another machine."""
    if owner.get("place") != _place():
        return None
    if Path("/proc/self/stat").exists():
        return _started(owner["pid"]) != owner.get("started")
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def say_owner(owner: dict[str, Any]) -> str:
    """An owner in words: process, host, job, since when, command."""
    since = datetime.fromtimestamp(owner["since"]).astimezone().isoformat(" ", "seconds")
    job = f", job {owner['job']}" if owner.get("job") else ""
    command = f" ({owner['command']})" if owner.get("command") else ""
    return f"process {owner['pid']} on {owner['host']}{job}, since {since}{command}"


def parse_owner(content: bytes) -> dict[str, Any]:
    """The owner in a lock's text; empty if it is not written yet."""
    try:
        owner = json.loads(content)
        return owner if {"id", "host", "pid", "beat", "since"} <= owner.keys() else {}
    except (ValueError, AttributeError):
        return {}


def refusal(owner: dict[str, Any], mine: dict[str, Any], directory: Path) -> str:
    """The message for the process `mine`, which found a living owner."""
    here = owner.get("place") == mine["place"]
    stop = f"kill {owner['pid']}" if here else f"on {owner['host']}: kill {owner['pid']}"
    limit = owner.get("stale_after", mine["stale_after"])
    file = shlex.quote(f"{directory}/STOP")
    ask = f"gcloud storage cp /dev/null {file}" if is_remote(directory) else f"touch {file}"
    lines = [f"{directory} is in use by {say_owner(owner)}",
             f"to stop that one after a step, which is saved: {ask}  (or {stop})",
             "to take it over: give the same command again when that one has ended; if its machine is dead, that is"
             f" seen after {limit:g} s (its run.stale_after)", "to train something else: give another run.dir"]
    return "\n  ".join(lines)
