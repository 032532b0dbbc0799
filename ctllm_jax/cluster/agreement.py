"""Whether all processes of a run are about to do the same, compared before they do it.

Each process publishes a hash and a text of its values through the key-value store of JAX's coordinator. This needs no
device, so it works even if devices or versions of jax differ. Process 0 compares the hashes, reads the texts only if
they differ, and writes the result that all processes use.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ctllm_jax.cluster import distributed
from ctllm_jax.cluster.roll_call import name_numbers
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.load import shared_values
from ctllm_jax.report.run import flatten

Opened = TypeVar("Opened")
_ERROR = "error"
_POLL, _LONGEST_POLL = 0.05, 1.0
"""Seconds between two looks: the first, and the longest."""
_MOST_GROUPS, _MOST_KEYS = 8, 20
"""Of the values that differ, and of the keys: how many are named."""
_numbers = itertools.count()


def join(config: Any, *, command: str) -> None:
    """Join the other processes of a training command, if there are any, and compare what they are about to do.

    Raises:
      UserError: some did not arrive, or they differ in command, config, version, code or devices; the message names
        them.
    """
    if distributed.initialize(config.distributed.heartbeat_seconds) > 1:
        check_same({**describe_program(), "command": command, **shared_values(config)}, what="command, config and code")


def check_same(values: dict[str, Any], *, what: str) -> None:
    """Compare nested values between all processes, which call this at the same point; with one process do nothing.

    Args:
      values: of this process, as JSON.
      what: a description of the values, for the message.

    Raises:
      UserError: they differ; names each key, and which process has which value. Raised on every process.
    """
    problem = _exchange(values)
    if problem:
        raise UserError(f"the processes of this run do not have the same {what}:\n  {problem}\nstart all of them with"
                        " the same command, files and code")


def open_same(open_it: Callable[[], Opened], fingerprint: Callable[[Opened], dict[str, Any]], *, what: str) -> Opened:
    """Open something on every process, and compare its fingerprint as `check_same` does.

    Raises:
      UserError: it could not be opened on some process, whose message is shown on every process, or it differs. The
        process itself raises its own error.
    """
    error = opened = None
    try:
        opened = open_it()
        values = fingerprint(opened)
    except Exception as failed:  # any error, because the others would wait for this process
        error, values = failed, {_ERROR: str(failed) or type(failed).__name__}
    problem = _exchange(values)
    if error is not None:
        raise error
    if problem:
        raise UserError(f"the processes of this run do not have the same {what}:\n  {problem}")
    return opened


@cache
def hash_code() -> str:
    """A hash of the package's source: two checkouts may have one version number and different code."""
    package = Path(__file__).resolve().parent.parent
    files = sorted(package.rglob("*.py"))
    return hashlib.sha256(b"".join(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes()
                                   for path in files)).hexdigest()[:16]


def describe_program() -> dict[str, Any]:
    """The program of this process: versions, code, and its devices."""
    import jax

    from ctllm_jax import __version__

    devices = jax.local_devices()
    return {"ctllm_jax": __version__, "code of ctllm_jax": hash_code(), "jax": jax.__version__,
            "devices of a process": f"{len(devices)} x {devices[0].device_kind}"}


def _exchange(values: dict[str, Any]) -> str:
    """A description of the differences between the processes; empty if there are none."""
    import jax

    number = next(_numbers)
    if jax.process_count() == 1:
        return ""
    # The store has no public name. Orbax and jax.experimental.multihost_utils use it too.
    from jax._src import distributed

    client = distributed.global_state.client
    assert client is not None, "several processes have joined"
    index, prefix = jax.process_index(), f"ctllm_jax/agreement/{number}"
    text = json.dumps(values, sort_keys=True, default=str)
    client.key_value_set(f"{prefix}/text/{index}", text)
    client.key_value_set(f"{prefix}/hash/{index}", hashlib.sha256(text.encode()).hexdigest())
    verdict = f"{prefix}/verdict"
    if index:
        return _wait(lambda: client.key_value_dir_get(verdict))[0][1].removeprefix("=")
    hashes = _wait(lambda: client.key_value_dir_get(f"{prefix}/hash"), count=jax.process_count())
    groups: dict[str, list[int]] = {}
    for key, value in hashes:
        groups.setdefault(value, []).append(int(key.rpartition("/")[2]))
    texts: list[tuple[list[int], dict[str, Any]]] = []
    for members in sorted(map(sorted, groups.values()), key=lambda members: (-len(members), members)):
        if len(groups) > 1 and len(texts) < _MOST_GROUPS:
            said = json.loads(client.blocking_key_value_get(f"{prefix}/text/{members[0]}", 60_000))
            texts.append((members, said))
    problem = describe_differences(texts)
    client.key_value_set(f"{verdict}/0", f"={problem}")
    return problem


def _wait(look: Callable[[], list[tuple[str, str]]], *, count: int = 1) -> list[tuple[str, str]]:
    """Wait until a directory has this many entries, in short polls, so that a signal can end the wait."""
    pause = _POLL
    while len(found := look()) < count:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_POLL)
    return found


def describe_differences(groups: list[tuple[list[int], dict[str, Any]]]) -> str:
    """The keys in which groups of processes differ, one line each: `key: 1 in process 0, 2 in processes 1-3`."""
    failed = [(members, values[_ERROR]) for members, values in groups if _ERROR in values]
    if failed:
        return "\n  ".join(f"{name_numbers(members)}: {message}" for members, message in failed)
    flat = [(members, flatten(values)) for members, values in groups]
    lines = []
    for key in sorted({key for _, values in flat for key in values}):
        by_value: dict[str, list[int]] = {}
        for members, values in flat:
            by_value.setdefault(_shown(values[key]) if key in values else "absent", []).extend(members)
        if len(by_value) > 1:
            lines.append(f"{key}: " + ", ".join(f"{value} in {name_numbers(sorted(members))}"
                                                for value, members in by_value.items()))
    more = [f"and {len(lines) - _MOST_KEYS} more keys"] if len(lines) > _MOST_KEYS else []
    return "\n  ".join([*lines[:_MOST_KEYS], *more])


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:100]}… ({hashlib.sha256(text.encode()).hexdigest()[:12]})"
