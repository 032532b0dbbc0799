"""What a scheduler and a person send, and who owns the run directory."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from fault_matrix.bench import Bench, Child, Lost, Outcome, fault, wait_for_step, work_again
from tests.runs import DEBUG
from tests.training.test_lock import another_machine
from tests.training.test_signals import SHARED, STEPS

OVERRIDES = (f"steps={STEPS}", *SHARED)


def words(run: Path, *more: str) -> tuple[str, ...]:
    """The command of every run here."""
    return "pretrain", DEBUG, f"run.dir={run}", *OVERRIDES, *more


def judge(bench: Bench, outcome: Outcome, run: Path, problem: str = "") -> None:
    """The same end as that of the run which nobody disturbed."""
    reference = bench.undisturbed(*OVERRIDES, devices=2)
    problem = problem or bench.differing([run], reference, step=STEPS).get(str(run), "")
    outcome.add(problem, again=work_again(run))


def _begin(bench: Bench, run: Path, *more: str) -> Child:
    bench.undisturbed(*OVERRIDES, devices=2)
    child = bench.start(*words(run, *more), devices=2)
    wait_for_step(run, [child])
    return child


def _told(bench: Bench, outcome: Outcome, run: Path, *numbers: int, status: int) -> None:
    child = _begin(bench, run)
    for number in numbers:
        os.kill(child.pid, number)
    done = child.wait().expect(status, "stopped at step .* kept")
    outcome.message = bench.line(done.text, "stopped at step")
    bench.launch(*words(run), devices=2).expect(0, "resuming at step")
    judge(bench, outcome, run)


@fault("sigterm-twice", "SIGTERM twice, as a scheduler tells a job and its steps")
def sigterm_twice(bench: Bench, outcome: Outcome) -> None:
    """Within a moment: one notice."""
    _told(bench, outcome, bench.directory(), signal.SIGTERM, signal.SIGTERM, status=75)


@fault("ctrl-c", "Ctrl-C")
def ctrl_c(bench: Bench, outcome: Outcome) -> None:
    """Status 130, and yet kept."""
    _told(bench, outcome, bench.directory(), signal.SIGINT, status=130)


@fault("sigterm-one", "SIGTERM to one of two processes")
def sigterm_one(bench: Bench, outcome: Outcome) -> None:
    """Both stop behind the same step."""
    bench.undisturbed(*OVERRIDES, devices=2)
    run = bench.directory()
    both = bench.start_processes(2, *words(run))
    wait_for_step(run, both)
    os.kill(both[1].pid, signal.SIGTERM)
    texts = [child.wait().expect(75).text for child in both]
    outcome.message = bench.line("\n".join(texts), "preempted")
    for child in bench.start_processes(2, *words(run)):
        child.wait().expect(0)
    judge(bench, outcome, run)


@fault("two-trainers", "a second trainer on the same run directory")
def two_trainers(bench: Bench, outcome: Outcome) -> None:
    """It is refused; the first does not notice."""
    run = bench.directory()
    first = _begin(bench, run, "checkpoint.every=100")
    refused = bench.launch(*words(run, "checkpoint.every=100"), devices=2)
    running = first.poll() is None
    outcome.message = bench.line(refused.text, "in use by process")
    first.wait().expect(0)
    if not running:
        raise Lost("the first had ended when the second was refused")
    refused.expect(2, "in use by process")
    judge(bench, outcome, run)


@fault("stale-lock", "the lock of a killed owner, on this machine and on another one")
def stale_lock(bench: Bench, outcome: Outcome) -> None:
    """Taken over at once, or when its heart stood still."""
    for elsewhere in (False, True):
        run = bench.directory()
        _begin(bench, run, "checkpoint.every=20").kill()
        if elsewhere:
            another_machine(run, stale_after=2.0)
        done = bench.launch(*words(run, "checkpoint.every=20"), devices=2).expect(0, "which is gone: taken over")
        outcome.message = bench.line(done.text, "taken over")
        judge(bench, outcome, run)
