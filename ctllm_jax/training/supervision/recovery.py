"""Back to the last good checkpoint where steps stay bad, and on behind the data that hurt.

Every process reads the same metrics of a step when the next one is on its way, and so decides the same. What the
decision rests on (skipped steps in a row, rollbacks so far) lies in each checkpoint's meta: a run that is killed and
goes on decides as if nothing had happened. With `bad_steps.rollback_after` null nothing is read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from ctllm_jax.cluster.distributed import tell_all
from ctllm_jax.config.reliability import BadStepsConfig
from ctllm_jax.config.statuses import DIVERGED
from ctllm_jax.training.checkpoints.checkpointer import Checkpointer
from ctllm_jax.training.checkpoints.files import CHECKPOINTS, MILESTONES, discard, list_steps
from ctllm_jax.training.state import Spikes, State, init_spikes


class Diverged(SystemExit):
    """Steps stay bad, and no rollback is left; `code` is the exit status, `message` says what to do."""

    def __init__(self, message: str):
        super().__init__(DIVERGED)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Rollback(NamedTuple):
    """What was done: from behind `step` back to step `to`, and on at `data_step`; the number of rollbacks so far."""

    step: int
    to: int
    data_step: int
    rollbacks: int


class Recovery:
    """Counts skipped steps in a row, and says when to go back.

    Args:
      config: after how many, how often.
      meta: of the run's checkpoints; what is counted is kept in it.
      known: `recovery` of the checkpoint that the run goes on from, if any.
    """

    def __init__(self, config: BadStepsConfig, *, meta: dict[str, Any], known: dict[str, int] | None = None):
        self._config, self._meta = config, meta
        known = known or {}
        self.in_a_row, self.rollbacks, self.at = known.get("in_a_row", 0), known.get("rollbacks", 0), 0
        self._counts: dict[str, int] = {}
        self._note()

    @property
    def watches(self) -> bool:
        """Whether `judge` is to be asked."""
        return self._config.rollback_after is not None

    @property
    def due(self) -> bool:
        """Whether to go back now."""
        return self.watches and self.in_a_row >= self._config.rollback_after

    def judge(self, step: int, metrics: dict[str, Any]) -> bool:
        """Whether to go back behind this step; its metrics are on the devices."""
        self.at, self.in_a_row = step, (self.in_a_row + 1 if int(metrics["skipped"]) else 0)
        self._note()
        if self.due:
            self._counts = {name: int(metrics[name]) for name in ("bad_steps", "spikes") if name in metrics}
        return self.due

    def go_back(self, checkpointer: Checkpointer, abstract: State, *,
                data_step: int) -> tuple[Rollback, State, Checkpointer]:
        """Back from behind the step judged last, whose batch was the one before `data_step`, to the newest whole
        checkpoint from before the skipped ones.

        What is kept of later steps is removed. The counts of skipped steps are those of the end, not of the checkpoint.

        Returns:
          What was done, the state to go on with, and a checkpointer that does not know what was given up.

        Raises:
          Diverged: no rollback is left, or no checkpoint is there from before.
          UserError: those from before are damaged.
        """
        run_dir, before = checkpointer.run_dir, self.at - self.in_a_row
        where = f"{self.in_a_row} steps in a row were skipped, up to step {self.at}"
        if self.rollbacks >= self._config.max_rollbacks:
            raise Diverged(f"diverged: {where}, after {self.rollbacks} rollbacks (bad_steps.max_rollbacks); look at the"
                           " data of these steps and at grad_norm before them, or take a smaller optimizer.lr in"
                           f" another run.dir with init={run_dir}")
        checkpointer.close()
        # What a disk shows may differ between hosts for a moment: the first process decides.
        first = jax.process_index() == 0
        kept = [path for kind in (CHECKPOINTS, MILESTONES) for path in list_steps(run_dir, kind)] if first else []
        if not tell_all(int(any(path.parent.name == CHECKPOINTS and int(path.name) <= before for path in kept))):
            raise Diverged(f"diverged: {where}, and there is no checkpoint from before them to go back to; look at the"
                           " data of these steps, or take a smaller optimizer.lr or a longer optimizer.warmup_steps")
        for path in kept:
            if int(path.name) > before:
                discard(path)
        tell_all(0)  # the others wait until it is gone
        checkpointer = Checkpointer(run_dir, checkpointer.config, tokens_per_step=checkpointer.tokens_per_step,
                                    meta=checkpointer.meta, tokens_at=checkpointer.tokens_at)
        step = checkpointer.latest()
        state = restore_state(checkpointer, abstract, step=step)
        self.in_a_row, self.rollbacks = 0, self.rollbacks + 1
        self._note()

        def place(value: int, like: jax.Array) -> jax.Array:
            return jax.device_put(np.int32(value), like.sharding)

        counts = state.bad_steps
        if isinstance(counts, Spikes):
            counts = counts.replace(**{name: place(value, getattr(counts, name))
                                       for name, value in self._counts.items()})
        else:
            counts = place(self._counts["bad_steps"], counts)
        state = state.replace(data_step=place(data_step, state.data_step), bad_steps=counts)
        return Rollback(self.at, step, data_step, self.rollbacks), state, checkpointer

    def _note(self) -> None:
        if self.watches:
            self._meta["recovery"] = {"in_a_row": self.in_a_row, "rollbacks": self.rollbacks}


def restore_state(checkpointer: Checkpointer, abstract: State, *, step: int) -> State:
    """The state of a step, whether or not the guard against spikes was on when it was kept.

    Where it is turned on, it has seen nothing yet; where it is turned off, only the count of bad steps stays.
    """
    kept, wanted = bool(checkpointer.read_meta(step).get("spikes")), isinstance(abstract.bad_steps, Spikes)
    if kept == wanted:
        return checkpointer.restore(abstract, step=step)
    if wanted:
        state = checkpointer.restore(abstract.replace(bad_steps=abstract.bad_steps.bad_steps), step=step)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.bad_steps)
        return state.replace(bad_steps=jax.jit(init_spikes, out_shardings=shardings)(state.bad_steps))
    count = abstract.bad_steps
    guard = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=count.sharding),
                         jax.eval_shape(init_spikes, count))
    state = checkpointer.restore(abstract.replace(bad_steps=guard), step=step)
    return state.replace(bad_steps=state.bad_steps.bad_steps)
