"""Resume with another number of steps: the effect on the learning rate, and a better way.

The schedule is a function of the step and the number of steps. If a finished cosine or WSD run gets more steps, its
learning rate jumps up again from the minimum, and the decay is lost.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ctllm_jax.config.pretrain import OptimizerConfig, PretrainConfig
from ctllm_jax.config.stages import STAGES
from ctllm_jax.storage import is_remote
from ctllm_jax.training.checkpoints.files import CHECKPOINTS, list_steps
from ctllm_jax.training.optimizer import make_schedule

SMOOTH = 0.01
"""Share of the peak learning rate up to which a change does not count as a jump."""


class Rates(NamedTuple):
    """Learning rates at a step: of the last update, and of the next one with the old and the new schedule."""

    last: float
    expected: float
    following: float

    @property
    def jump(self) -> float:
        """Distance of the next learning rate from the expected or the last one, whichever is nearer."""
        return min(abs(self.following - self.expected), abs(self.following - self.last))


def rates_at(config: OptimizerConfig, *, step: int, before: int, steps: int) -> Rates:
    """The learning rates if a run of `before` steps continues at `step` as one of `steps`."""
    old, new = make_schedule(config, steps=before), make_schedule(config, steps=steps)
    return Rates(*(float(rate(np.int32(at))) for rate, at in ((old, max(step - 1, 0)), (old, step), (new, step))))


def describe_jump(config: PretrainConfig, *, run_dir: Path, step: int, before: int) -> str | None:
    """The warning for a run that continues at `step` and had `before` steps; None if its learning rate is
    continuous."""
    optimizer, steps = config.optimizer, config.steps

    def jump(at: int) -> float:
        return rates_at(optimizer, step=at, before=before, steps=steps).jump

    if steps == before or jump(step) <= SMOOTH * optimizer.lr:
        return None
    rates = rates_at(optimizer, step=step, before=before, steps=steps)
    told = [f"the learning rate jumps: the last update, of step {step:,}, had {rates.last:.3g}, and the next one will"
            f" have {rates.following:.3g}, because steps={steps} replaces steps={before} and"
            f" optimizer.schedule={optimizer.schedule} follows it (with steps={before} it would have"
            f" {rates.expected:.3g})"]
    # Of the saved steps, the newest at which both schedules agree; else the one where they differ least.
    kept = [number for path in list_steps(run_dir, CHECKPOINTS) if (number := int(path.name)) < step]
    best = max((each for each in kept if jump(each) <= SMOOTH * optimizer.lr), default=None)
    best = best if best is not None else min(kept, key=jump, default=None)
    if best is not None and jump(best) < jump(step):
        found = rates_at(optimizer, step=best, before=before, steps=steps)
        new_dir = f"{run_dir}-from-{best}"
        copy = (f"gcloud storage cp -r {shlex.quote(f'{run_dir}/{CHECKPOINTS}/{best}')} "
                f"{shlex.quote(f'{new_dir}/{CHECKPOINTS}/')}" if is_remote(run_dir) else
                f"mkdir -p {shlex.quote(f'{new_dir}/{CHECKPOINTS}')} && cp -r"
                f" {shlex.quote(f'{run_dir}/{CHECKPOINTS}/{best}')} {shlex.quote(f'{new_dir}/{CHECKPOINTS}/')}")
        told += [f"better: Ctrl-C, and go on from step {best:,} in another run directory, where the last update had"
                 f" {found.last:.3g} and the next one will have {found.following:.3g}:", copy, _command(new_dir)]
    else:
        told += [f"better: no step before step {step:,} is kept from which the learning rate would go on smoothly;"
                 " train all steps in another run directory (there, checkpoint.keep_every keeps steps to go on from):",
                 _command(f"{run_dir}-{steps}-steps")]
    return "\n  ".join(told)


def _command(new_dir: str) -> str:
    """The command line of this process, with another run directory."""
    words = [word for word in sys.argv[1:] if not word.startswith(("run.dir=", "run="))]
    if not words or words[0] not in STAGES:
        return f"the same command, with run.dir={shlex.quote(new_dir)}"
    return f"python launch.py {shlex.join([*words, f'run.dir={new_dir}'])}"
