"""Find problems that would stop a run on this machine before it starts; every check has a time limit.

A check (ctllm_jax/preflight/checks.py) runs in a thread that is abandoned when its time is up, or, if it imports
jax, in a process of its own, which is killed then: a flag that XLA does not know ends a process, with nothing to catch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.stages import STAGES
from ctllm_jax.preflight import checks
from ctllm_jax.preflight.findings import FAIL, Finding, Subject, as_json, late

_CHILD = "from ctllm_jax.preflight.doctor import be_child; be_child()"


def examine(subject: Subject, *, seconds: float, tell: Callable[[str], None] = lambda name: None) -> Iterator[Finding]:
    """All findings, in the order of the checks; none takes longer than `seconds`.

    The processes run in parallel with the threads, two at a time. `tell` is called with the name of the awaited check.
    """
    with ThreadPoolExecutor(2) as pool:
        started: dict[str, Future] = {name: pool.submit(_in_process, name, subject, seconds)
                                      for name in checks.CHILDREN}
        for name, check in checks.CHECKS.items():
            tell(name)
            yield from started[name].result() if name in started else _in_thread(name, check, subject, seconds)


def _in_thread(name: str, check: Callable[[Subject], list[Finding]], subject: Subject, seconds: float) -> list[Finding]:
    found: list[list[Finding]] = []

    def run() -> None:
        found.append(_safely(name, check, subject))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else late(name, seconds)


def _safely(name: str, check: Callable[[Subject], list[Finding]], subject: Subject) -> list[Finding]:
    """A check that breaks is a finding, not the end of the doctor."""
    try:
        return check(subject)
    except UserError as error:
        return [Finding(name, FAIL, str(error), "as the message says")]
    except Exception as error:
        return [Finding(name, FAIL, f"{type(error).__name__}: {error}", "this check itself broke: please report it")]


def _in_process(name: str, subject: Subject, seconds: float) -> list[Finding]:
    """The check in a process of its own; what it said last, where it died."""
    config = None if subject.config is None else subject.config.model_dump(mode="json")
    # A new session, so that its child processes end with it.
    with subprocess.Popen([sys.executable, "-c", _CHILD, name, subject.stage], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(subject.environment),
                          start_new_session=True) as child:
        try:
            out, errors = child.communicate(json.dumps(config), timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            return late(name, seconds)
    lines = [line for line in out.splitlines() if line.startswith("[")]
    if child.returncode == 0 and lines:
        return [Finding(**each) for each in json.loads(lines[-1])]
    return checks.explain_death(name, errors, child.returncode)


def be_child() -> None:
    """In a process of its own: the check whose name and stage are the arguments, the config on standard input."""
    name, stage = sys.argv[1:3]
    values: Any = json.load(sys.stdin)
    config = None if values is None else STAGES[stage].schema.model_validate(values)
    found = _safely(name, checks.CHECKS[name], Subject(config, stage, os.environ))
    sys.stdout.write(f"{json.dumps(as_json(found))}\n")
