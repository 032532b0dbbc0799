"""Processes that are gone, that stand still, or whose data does not come."""

from __future__ import annotations

import os
import signal

from fault_matrix.bench import Bench, Outcome, fault, wait_for_step, work_again
from fault_matrix.signals import OVERRIDES, judge, words
from tests.runs import REPOSITORY

HANGING = REPOSITORY / "tests/training/hanging.py"
HEARTBEAT = 10


def _lose(bench: Bench, outcome: Outcome, number: int) -> None:
    """The other one of two names it and asks to be started again; both are, and come to the same end."""
    bench.undisturbed(*OVERRIDES, devices=2)
    run = bench.directory()
    command = words(run, "checkpoint.every=20", f"distributed.heartbeat_seconds={HEARTBEAT}")
    both = bench.start_processes(2, *command)
    wait_for_step(run, both, step=40)
    os.kill(both[1].pid, number)
    done = both[0].wait(12 * HEARTBEAT)
    both[1].kill()
    done.expect(75, rf"process 1 \(of 2, .* pid {both[1].pid}\) has given no sign of life")
    outcome.message = bench.line(done.text, "has given no sign of life")
    for child in bench.start_processes(2, *command):
        child.wait().expect(0)
    judge(bench, outcome, run)


@fault("stopped", f"one of two processes stopped (SIGSTOP), heartbeat of {HEARTBEAT} s")
def stopped(bench: Bench, outcome: Outcome) -> None:
    """It keeps its connections; nothing but its silence tells."""
    _lose(bench, outcome, signal.SIGSTOP)


@fault("killed-one", f"kill -9 of one of two processes, heartbeat of {HEARTBEAT} s")
def killed_one(bench: Bench, outcome: Outcome) -> None:
    """Its connections break."""
    _lose(bench, outcome, signal.SIGKILL)


@fault("hang", "data that stops coming, watchdog of 5 s")
def hang(bench: Bench, outcome: Outcome) -> None:
    """Batch 5 takes ten minutes."""
    overrides, run = ("checkpoint.every=2",), bench.directory()
    reference = bench.undisturbed(*overrides)
    done = bench.launch("5", f"run.dir={run}", *overrides, "watchdog.seconds=5", script=HANGING)
    done.expect(75, "no step was finished for", "wait_for_a_disk")
    outcome.message = bench.line(done.text, "no step was finished for")
    bench.pretrain(run, *overrides).expect(0, "resuming at step 4")
    outcome.add(bench.differing([run], reference, step=10).get(str(run), ""), again=work_again(run))
