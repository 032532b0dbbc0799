"""What every row needs: commands in processes of their own, their first lines, and whether two runs are the same.

A process here is a fork of this one, which has imported everything and computed nothing: what takes seconds is the
import. It runs the same script as a user's would, and may be killed, stopped and signalled like any other.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import random
import re
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tests.runs import DEBUG, REPOSITORY, assert_same_bits, read_arrays
from tests.training.test_processes import free_port

DONE, FAILED = 0, 1
_PATIENCE = 240.0


class NotTried(Exception):
    """This machine does not let the fault be made; says why."""


class Lost(Exception):
    """Something did not come out as it should; the text names it."""


@dataclass
class Outcome:
    """What became of one kind of fault. `lost`: what of the data or weights is gone, though all was survived."""

    tried: int = 0
    survived: int = 0
    lost: str = "none"
    message: str = ""
    not_tried: str = ""
    steps_again: int = 0
    seconds_again: float = 0.0
    problems: list[str] = field(default_factory=list)

    def add(self, problem: str = "", *, again: tuple[int, float] = (0, 0.0), faults: int = 1) -> None:
        """One fault was made; `problem` if it was not survived. `again` is the work of the worst."""
        self.tried += faults
        self.survived += 0 if problem else faults
        if problem:
            self.problems.append(problem)
        self.steps_again, self.seconds_again = max((self.steps_again, self.seconds_again), again)


class Fault(NamedTuple):
    """A row: how it is called in `--only`, what is done, and the function that does it."""

    name: str
    what: str
    run: Callable[[Bench, Outcome], None]


FAULTS: dict[str, Fault] = {}


def fault(name: str, what: str) -> Callable[[Callable], Callable]:
    """Register a function `(bench, outcome)` as a row."""
    def register(function: Callable) -> Callable:
        FAULTS[name] = Fault(name, what, function)
        return function

    return register


class Done(NamedTuple):
    """A process that has ended: status (negative: the signal that killed it), and all that it printed."""

    status: int
    text: str

    def expect(self, status: int, *patterns: str) -> Done:
        """Itself, or Lost: it ended otherwise, or did not print one of these regular expressions."""
        missing = [pattern for pattern in patterns if not re.search(pattern, self.text)]
        if self.status != status or missing:
            last = self.text.rstrip().rpartition("\n")[2]
            raise Lost(f"ended with status {self.status}, not {status}: {last}" if self.status != status else
                       f"did not say {missing}, but: {last}")
        return self


class Child:
    """A running process."""

    def __init__(self, pid: int, output: Path):
        self.pid, self._output, self._status = pid, output, None

    def poll(self) -> int | None:
        """Its status, or None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self, timeout: float = _PATIENCE) -> Done:
        """Its end; Lost if it does not come."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                self.kill()
                raise Lost(f"did not end within {timeout:.0f} s")
            time.sleep(0.02)
        return Done(self._status, self._output.read_text(errors="replace"))

    def kill(self) -> None:
        """Kill it, if it still runs; also when it is stopped."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


class Bench:
    """Runs in one scratch folder.

    Args:
      scratch: an empty folder.
      rounds: how often to try what is drawn at random.
      seed: of what is drawn.
    """

    def __init__(self, scratch: Path, *, rounds: int, seed: int = 0):
        self.scratch, self.rounds, self.seed = scratch, rounds, seed
        self.random = random.Random(seed)
        self._children: list[Child] = []
        self._undisturbed: dict[tuple, Path] = {}
        self._names = 0

    def directory(self, kind: str = "run") -> Path:
        """A new name, of a run or of data."""
        self._names += 1
        return self.scratch / f"{kind}-{self._names}"

    def fork(self, function: Callable[[], Any], *, devices: int = 1, variables: dict[str, str] | None = None) -> Child:
        """A function in a process of its own, whose end is that of an interpreter."""
        self._names += 1
        output = self.scratch / f"output-{self._names}.txt"
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            self._children.append(Child(pid, output))
            return self._children[-1]
        status = FAILED
        try:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
            logging.getLogger().handlers.clear()  # what this process imported has set one up; a command does it itself
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where this was begun in the background
            os.environ.update(variables or {}, XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
            function()
            status = DONE
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else DONE if ended.code is None else FAILED
        except BaseException:  # of a fork: nothing of it may go on in this process's own code
            traceback.print_exc()
        finally:
            atexit._run_exitfuncs()  # JAX takes leave of the other processes there
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What a function returns, as JSON, computed in a process of its own."""
        answer = self.directory().with_suffix(".json")
        done = self.fork(lambda: answer.write_text(json.dumps(function(*arguments))), **options).wait(1800)
        if done.status:
            raise RuntimeError(f"{function.__name__} failed:\n{done.text}")
        return json.loads(answer.read_text())

    def start(self, *words: Any, script: Path = REPOSITORY / "launch.py", prepare: Callable[[], Any] = lambda: None,
              **options: Any) -> Child:
        """`launch.py`, or another script, begun; `prepare` is called in the new process."""
        def run() -> None:
            prepare()
            sys.argv = [str(script), *map(str, words)]
            runpy.run_path(str(script), run_name="__main__")

        return self.fork(run, **options)

    def launch(self, *words: Any, **options: Any) -> Done:
        """`start`, to the end."""
        return self.start(*words, **options).wait()

    def pretrain(self, directory: Path, *overrides: str, **options: Any) -> Done:
        """The debug run to its end."""
        return self.launch("pretrain", DEBUG, f"run.dir={directory}", *overrides, **options)

    def start_processes(self, count: int, *words: Any, **options: Any) -> list[Child]:
        """One program in so many processes of one device each."""
        shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
        return [self.start(*words, variables={**shared, "JAX_PROCESS_ID": str(index)}, **options)
                for index in range(count)]

    def undisturbed(self, *overrides: str, devices: int = 1) -> Path:
        """The debug run that nobody disturbs; made once."""
        key = overrides, devices
        if key not in self._undisturbed:
            self._undisturbed[key] = self.directory()
            done = self.pretrain(self._undisturbed[key], *overrides, devices=devices)
            if done.status:
                raise RuntimeError(f"the run that nobody disturbs failed:\n{done.text}")
        return self._undisturbed[key]

    def differing(self, directories: Iterable[Path], reference: Path, *, step: int) -> dict[str, str]:
        """{run: what is not the same, bit for bit} of weights and optimizer at a step."""
        return self.call(_differing, [str(directory) for directory in directories], str(reference), step)

    def end(self) -> None:
        """Kill what is left."""
        for child in self._children:
            child.kill()
        self._children.clear()

    def line(self, text: str, pattern: str) -> str:
        """The first line with a regular expression in it, as a reader of the table needs it: paths are short."""
        found = next((line.strip() for line in text.splitlines() if re.search(pattern, line)), "")
        return re.sub(rf"{re.escape(str(self.scratch))}/(run|data)-\d+(/run|/\d+)?\b", lambda path: path[1].upper(),
                      found)


def wait_for_step(directory: Path, children: list[Child], *, step: int = 1) -> None:
    """Until a step is in the metrics."""
    until = time.monotonic() + _PATIENCE
    while not any(record["event"] == "train" and record["step"] >= step for record in events(directory)):
        if time.monotonic() > until or any(child.poll() is not None for child in children):
            raise Lost("ended, or hung, before anything was done to it")
        time.sleep(0.02)


def events(directory: Path) -> list[dict[str, Any]]:
    """Every line of a run's metrics, those of attempts that were cut off, too."""
    path, found = directory / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # torn by a kill
    return found


def work_again(directory: Path) -> tuple[int, float]:
    """Steps that a run made more than once, the most at one restart or rollback, and what they took: by the steps'
    own seconds as the metrics have them."""
    worst, last, seconds = (0, 0.0), 0, []
    for record in events(directory):
        back = {"start": record.get("step"), "rollback": record.get("to")}.get(record["event"])
        if back is not None:
            again = max(0, last - back)
            worst = max(worst, (again, again * median(seconds or [0.0])))
            last, seconds = back, []
        elif record["event"] == "train":
            last = record["step"]
            seconds.append(record["step_seconds"])
    return worst


def _differing(directories: list[str], reference: str, step: int) -> dict[str, str]:
    wanted, found = read_arrays(reference, step), {}
    for directory in directories:
        try:
            assert_same_bits(read_arrays(directory, step), wanted)
        except AssertionError as error:
            found[directory] = f"other bits: {error}"
        except (OSError, ValueError) as error:
            found[directory] = f"cannot be read: {error}"
    return found
