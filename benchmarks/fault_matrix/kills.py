"""kill -9: at any moment, and at each of the moments that matter."""

from __future__ import annotations

from pathlib import Path

from fault_matrix.bench import Bench, Outcome, events, fault, work_again
from tests.training import killed_run

STEPS = 10
OVERRIDES = ("checkpoint.every=1", "checkpoint.keep_last=2", "mesh.fsdp=2", "mesh.data=1")


def _rounds(rounds: int, seed: int, directory: str) -> int:
    return killed_run.kill_rounds(rounds, seed, directory, OVERRIDES)[1]


def _each(directory: str) -> list[dict]:
    return list(killed_run.kill_each(directory, OVERRIDES))


def _judge(bench: Bench, outcome: Outcome, runs: list[Path]) -> None:
    """Each was killed as often as it was started, but for its last time."""
    reference = bench.undisturbed(*OVERRIDES, devices=2)
    differing = bench.differing(runs, reference, step=STEPS)
    for directory in runs:
        kills = sum(record["event"] == "start" for record in events(directory)) - 1
        outcome.add(differing.get(str(directory), ""), faults=kills, again=work_again(directory))
    steps = [record["step"] for record in events(runs[-1]) if record["event"] == "start"]
    outcome.message = f"start             resuming at step {max(steps)}"


@fault("kill", "kill -9 at any moment of stepping, saving, deleting")
def kill(bench: Bench, outcome: Outcome) -> None:
    """At random, so many times; the run that is killed goes on until it is through, and then the next one."""
    bench.undisturbed(*OVERRIDES, devices=2)
    directory = bench.directory()
    count = bench.call(_rounds, bench.rounds, bench.seed, str(directory), devices=2)
    _judge(bench, outcome, [directory / str(number) for number in range(count)])


@fault("kill-moments", "kill -9 at each of seven moments of a save")
def kill_moments(bench: Bench, outcome: Outcome) -> None:
    """One run, killed at each of its steps."""
    directory = bench.directory()
    bench.call(_each, str(directory), devices=2)
    _judge(bench, outcome, [directory])
