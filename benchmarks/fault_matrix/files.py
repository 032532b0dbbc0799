"""Every file of a checkpoint with a bit changed, cut in half, deleted."""

from __future__ import annotations

import shutil

from fault_matrix.bench import Bench, Outcome, fault, work_again
from fault_matrix.kills import OVERRIDES, STEPS
from tests.training.test_checkpoint_damage import DAMAGES


def _damage_each(bench: Bench, outcome: Outcome, how: str) -> None:
    """The run whose newest step has one damaged file is started again: for each file."""
    reference = bench.undisturbed(*OVERRIDES, devices=2)
    newest = reference / "checkpoints" / str(STEPS)
    names = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    directory, noticed, ended, problems = bench.directory(), 0, [], {}
    for number, name in enumerate(names):
        run = directory / str(number)
        shutil.copytree(reference, run)
        DAMAGES[how](run / "checkpoints" / str(STEPS) / name)
        done = bench.pretrain(run, *OVERRIDES, devices=2)
        seen = (run / "quarantine" / str(STEPS)).is_dir()
        noticed += seen
        if done.status:
            problems[run] = f"{name}: status {done.status}"
        elif seen and str(name) not in (run / "quarantine" / f"{STEPS}.txt").read_text():
            problems[run] = f"{name} is not named"
        ended.append(run)
        if seen and name.parent.name == "d":
            outcome.message = bench.line(done.text, "is damaged")
    differing = bench.differing(ended, reference, step=STEPS)
    for run, name in zip(ended, names, strict=True):
        problem = problems.get(run) or differing.get(str(run), "")
        outcome.add(problem and f"{name}: {problem}", again=work_again(run))
    outcome.lost = f"none ({noticed} noticed, {len(names) - noticed} of no matter)"
    shutil.rmtree(directory)


@fault("flip", "a bit changed in each file of the newest checkpoint")
def flip(bench: Bench, outcome: Outcome) -> None:
    """One bit in the middle."""
    _damage_each(bench, outcome, "flipped")


@fault("truncate", "each file of the newest checkpoint cut in half")
def truncate(bench: Bench, outcome: Outcome) -> None:
    """Half of it is left."""
    _damage_each(bench, outcome, "truncated")


@fault("delete", "each file of the newest checkpoint deleted")
def delete(bench: Bench, outcome: Outcome) -> None:
    """It is not there."""
    _damage_each(bench, outcome, "deleted")
