"""If steps stay bad, return to the last good checkpoint and skip the data that caused them.

Every process reads the same metrics of a step while the next one runs, and so takes the same decision. The decision
depends on counters (consecutive skipped steps, rollbacks so far) that are stored in each checkpoint's meta, so a run
that is killed and resumed repeats it. If `bad_steps.rollback_after` is null, nothing is read.
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
    """Steps stay bad, and no rollback is left; `code` is the exit status, `message` states what to do."""

    def __init__(self, message: str):
        super().__init__(DIVERGED)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Rollback(NamedTuple):
    """A rollback: after `step`, the run returned to step `to` and continues at `data_step`; and the number of rollbacks
    so far."""

    step: int
    to: int
    data_step: int
    rollbacks: int


class Recovery:
    """Counts consecutive skipped steps, and decides when to roll back.

    Args:
      config: the limits.
      meta: the meta of the run's checkpoints, which stores the counters.
      known: `recovery` of the checkpoint that the run resumes from, if any.
    """

    def __init__(self, config: BadStepsConfig, *, meta: dict[str, Any], known: dict[str, int] | None = None):
        self._config, self._meta = config, meta
        known = known or {}
        self.in_a_row, self.rollbacks, self.at = known.get("in_a_row", 0), known.get("rollbacks", 0), 0
        self._counts: dict[str, int] = {}
        self._note()

    @property
    def watches(self) -> bool:
        """Whether to call `judge`."""
        return self._config.rollback_after is not None

    @property
    def due(self) -> bool:
        """Whether to roll back now."""
        return self.watches and self.in_a_row >= self._config.rollback_after

    def judge(self, step: int, metrics: dict[str, Any]) -> bool:
        """Whether to roll back after this step; its metrics are on the devices."""
        self.at, self.in_a_row = step, (self.in_a_row + 1 if int(metrics["skipped"]) else 0)
        self._note()
        if self.due:
            self._counts = {name: int(metrics[name]) for name in ("bad_steps", "spikes") if name in metrics}
        return self.due

    def go_back(self, checkpointer: Checkpointer, abstract: State, *,
                data_step: int) -> tuple[Rollback, State, Checkpointer]:
        """Return from the last judged step, whose batch preceded `data_step`, to the newest intact checkpoint before
        the skipped steps.

        Checkpoints of later steps are removed. Counters of skipped steps keep their latest values, not those of the
        checkpoint.

        Returns:
          The rollback, the state to continue with, and a checkpointer without the discarded steps.

        Raises:
          Diverged: no rollback is left, or there is no earlier checkpoint.
          UserError: the earlier checkpoints are damaged.
        """
        run_dir, before = checkpointer.run_dir, self.at - self.in_a_row
        where = f"{self.in_a_row} steps in a row were skipped, up to step {self.at}"
        if self.rollbacks >= self._config.max_rollbacks:
            raise Diverged(f"diverged: {where}, after {self.rollbacks} rollbacks (bad_steps.max_rollbacks); look at the"
                           " data of these steps and at grad_norm before them, or take a smaller optimizer.lr in"
                           f" another run.dir with init={run_dir}")
        checkpointer.close()
        # Hosts may see different states of a disk for a moment, so the first process decides.
        first = jax.process_index() == 0
        kept = [path for kind in (CHECKPOINTS, MILESTONES) for path in list_steps(run_dir, kind)] if first else []
        if not tell_all(int(any(path.parent.name == CHECKPOINTS and int(path.name) <= before for path in kept))):
            raise Diverged(f"diverged: {where}, and there is no checkpoint from before them to go back to; look at the"
                           " data of these steps, or take a smaller optimizer.lr or a longer optimizer.warmup_steps")
        for path in kept:
            if int(path.name) > before:
                discard(path)
        tell_all(0)  # the others wait until it is removed
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
    """Restore the state of a step, whether or not the spike guard was enabled when it was saved.

    If the guard is newly enabled, its statistics are empty; if it is disabled, only the count of bad steps is kept.
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
