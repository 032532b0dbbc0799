"""Checkpoints: Orbax behind one module.

RUN/checkpoints/STEP/ holds a resumable step: `params`, `trainer` (optimizer state and counters), `meta` (JSON).
RUN/milestones/STEP/ holds weights kept for good: `params` and `meta`. Loading a MODEL reads `params` and `meta` alone.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pretrain import CheckpointConfig
from ctllm_jax.training.state import State

log = logging.getLogger(__name__)
CHECKPOINTS, MILESTONES = "checkpoints", "milestones"
TRASH = "trash"


@dataclass(frozen=True)
class Kept:
    """A checkpoint on disk."""

    step: int
    kind: str
    path: Path
    meta: dict[str, Any]
    size: int


class Checkpointer:
    """Saves and restores the states of one run, asynchronously.

    Args:
      run_dir: the run directory.
      config: what is kept.
      tokens_per_step: to find the steps of the milestones.
      meta: what a checkpoint says of itself: the fingerprint, and what a MODEL needs.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, *, tokens_per_step: int, meta: dict[str, Any]):
        self.config, self.meta, self.tokens_per_step = config, meta, tokens_per_step
        keep = [policies.LatestN(config.keep_last)]
        if config.keep_every:
            keep.append(policies.EveryNSteps(config.keep_every))
        self._steps = _manager(run_dir / CHECKPOINTS, policies.AnyPreservationPolicy(keep))
        self._milestones = _manager(run_dir / MILESTONES, None) if config.milestones else None

    def is_due(self, step: int, *, last: bool = False) -> bool:
        """Whether the config wants anything kept at this step."""
        return last or step % self.config.every == 0 or self.is_milestone(step)

    def save(self, state: State, *, step: int, last: bool = False) -> None:
        """Begin to save what the config wants kept at this step, if it is not kept already."""
        meta = {**self.meta, "step": step, "tokens": step * self.tokens_per_step}
        if (last or step % self.config.every == 0) and step not in self._steps.all_steps():
            self._steps.save(step, args=_items(state, meta, trainer=True))
            _empty_trash(self._steps.directory)
        if self._milestones is not None and self.is_milestone(step) and step not in self._milestones.all_steps():
            self._milestones.save(step, args=_items(state, meta, trainer=self.config.milestone_optimizer))

    def is_milestone(self, step: int) -> bool:
        """Whether `step` is the first at which one of the milestones is reached."""
        before, after = (step - 1) * self.tokens_per_step, step * self.tokens_per_step
        return any(before < milestone * 1e9 <= after for milestone in self.config.milestones)

    def latest(self) -> int | None:
        """The newest resumable step."""
        return self._steps.latest_step()

    def read_meta(self, step: int) -> dict[str, Any]:
        """What a resumable step says of itself."""
        return self._steps.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, abstract: State, *, step: int) -> State:
        """The state of a step, laid out as the shardings of `abstract` say, whatever mesh wrote it."""
        trainer = {name: getattr(abstract, name) for name in ("opt_state", "step", "data_step", "bad_steps")}
        restored = self._steps.restore(step, args=ocp.args.Composite(
            params=_restore_args(abstract.params), trainer=_restore_args(trainer)))
        return State(params=restored["params"], **restored["trainer"])

    def wait(self) -> None:
        """Block until what was begun is on disk; raises what went wrong there."""
        self._steps.wait_until_finished()
        if self._milestones is not None:
            self._milestones.wait_until_finished()

    def close(self) -> None:
        """Finish what was begun."""
        self.wait()
        self._steps.close()
        if self._milestones is not None:
            self._milestones.close()


def _manager(directory: Path, preservation: Any) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(directory.absolute(), options=ocp.CheckpointManagerOptions(
        # Retention in place leaves half-deleted steps that look whole when killed; renamed into the trash, none does.
        todelete_subdir=TRASH, preservation_policy=preservation, create=True, cleanup_tmp_directories=True,
        enable_async_checkpointing=True))


def _items(state: State, meta: dict[str, Any], *, trainer: bool) -> ocp.args.Composite:
    items = {"params": ocp.args.StandardSave(state.params), "meta": ocp.args.JsonSave(meta)}
    if trainer:
        items["trainer"] = ocp.args.StandardSave({"opt_state": state.opt_state, "step": state.step,
                                                  "data_step": state.data_step, "bad_steps": state.bad_steps})
    return ocp.args.Composite(**items)


def _restore_args(abstract: Any) -> ocp.args.StandardRestore:
    return ocp.args.StandardRestore(abstract)


def _empty_trash(directory: Any) -> None:
    if jax.process_index() == 0:
        shutil.rmtree(Path(directory) / TRASH, ignore_errors=True)


def compare_fingerprints(kept: dict[str, Any], now: dict[str, Any], *, run_dir: Path) -> None:
    """Refuse to go on with a run under other data, tokenizer or config.

    Raises:
      UserError: every difference, with both values.
    """
    kept, now = _flatten(kept), _flatten(json.loads(json.dumps(now)))
    differing = [f"{key}: {kept.get(key, 'absent')} in the checkpoint, {now.get(key, 'absent')} now"
                 for key in sorted({*kept, *now}) if kept.get(key, "absent") != now.get(key, "absent")]
    if differing:
        raise UserError(f"{run_dir} cannot be resumed: what it was begun with differs from what it is to go on with:\n  "
                        + "\n  ".join(differing) + "\ntake these back, or give another run.dir (init=MODEL takes its weights along)")


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        flat = {}
        for name, entry in tree.items():
            flat |= _flatten(entry, f"{prefix}{name}.")
        return flat
    return {prefix[:-1]: tree}


def list_checkpoints(run_dir: Path) -> list[Kept]:
    """The finished checkpoints of a run, oldest first.

    Raises:
      UserError: no run directory there.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is no run directory: it has no config.yaml")
    kept = []
    for folder, kind in ((CHECKPOINTS, "resumable"), (MILESTONES, "milestone")):
        for path in (run_dir / folder).glob("[0-9]*"):
            # Orbax writes its own metadata last and renames a finished step into place.
            meta_file = path / "meta" / "metadata"
            if path.name.isdigit() and meta_file.is_file():
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                kept.append(Kept(int(path.name), kind, path, json.loads(meta_file.read_text()), size))
    return sorted(kept, key=lambda checkpoint: (checkpoint.step, checkpoint.kind))


def find_checkpoint(model: str) -> tuple[Path, Kept]:
    """The run directory and the checkpoint that a MODEL names: a run directory (its newest), or RUN@STEP.

    Raises:
      UserError: no such run or step; the message lists the steps there are.
    """
    name, at, wanted = model.rpartition("@")
    run_dir = Path(name if at and wanted.isdigit() else model)
    if not run_dir.is_dir():
        raise UserError(f"no model {model}: {run_dir} is no directory (a MODEL is a run directory, or RUN@STEP)")
    kept = list_checkpoints(run_dir)
    steps = sorted({checkpoint.step for checkpoint in kept})
    if not kept:
        raise UserError(f"no model {model}: {run_dir} has no checkpoint yet")
    step = int(wanted) if at and wanted.isdigit() else steps[-1]
    matching = [checkpoint for checkpoint in kept if checkpoint.step == step]
    if not matching:
        raise UserError(f"no model {model}: {run_dir} has no step {step}; it has {', '.join(map(str, steps))}")
    return run_dir, matching[-1]


def load_params(checkpoint: Kept, abstract_params: Any) -> Any:
    """The weights of a checkpoint, laid out as the shardings of `abstract_params` say."""
    restored = ocp.StandardCheckpointer().restore((checkpoint.path / "params").absolute(), abstract_params)
    return restored
