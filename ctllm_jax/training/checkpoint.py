"""Checkpoints: Orbax behind one module.

RUN/checkpoints/STEP/ holds a resumable step: `params`, `trainer` (optimizer state and counters), `meta` (JSON).
RUN/milestones/STEP/ holds weights kept for good: `params` and `meta`. Loading a MODEL reads `params` and `meta` alone.
A LoRA run's `params` are its adapters; `meta` says which MODEL they belong to, and loading merges the two.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import yaml
from orbax.checkpoint import checkpoint_managers as policies

from ctllm_jax import sharding
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.lora import LoraConfig
from ctllm_jax.config.model import ModelConfig
from ctllm_jax.config.pretrain import CheckpointConfig
from ctllm_jax.huggingface import model as huggingface
from ctllm_jax.model.decoder import init_params
from ctllm_jax.model.lora import merge
from ctllm_jax.training.fingerprint import flatten
from ctllm_jax.training.state import State

log = logging.getLogger(__name__)
CHECKPOINTS, MILESTONES = "checkpoints", "milestones"
TRASH, HUGGINGFACE = "trash", "huggingface"


@dataclass(frozen=True)
class Kept:
    """A checkpoint on disk."""

    step: int
    kind: str
    path: Path
    meta: dict[str, Any]
    size: int

    @property
    def run_dir(self) -> Path:
        """The run that it is of; a Hugging Face folder is its own."""
        return self.path if self.kind == HUGGINGFACE else self.path.parent.parent


class Checkpointer:
    """Saves and restores the states of one run, asynchronously.

    Args:
      run_dir: the run directory.
      config: what is kept.
      tokens_per_step: to find the steps of the milestones.
      meta: what a checkpoint says of itself: the fingerprint, and what a MODEL needs.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, *, tokens_per_step: int, meta: dict[str, Any]):
        self.run_dir, self.config, self.meta, self.tokens_per_step = run_dir, config, meta, tokens_per_step
        keep = [policies.LatestN(config.keep_last)]
        if config.keep_every:
            keep.append(policies.EveryNSteps(config.keep_every))
        self._steps = _manager(run_dir / CHECKPOINTS, policies.AnyPreservationPolicy(keep))
        self._milestones = _manager(run_dir / MILESTONES, None) if config.milestones else None

    def is_due(self, step: int, *, last: bool = False) -> bool:
        """Whether the config wants anything kept at this step."""
        return last or step % self.config.every == 0 or self.is_milestone(step)

    def save(self, state: State, *, step: int, last: bool = False) -> None:
        """Begin to save what the config wants kept at this step, and with `last` a resumable step in any case, if it is
        not kept already.

        Raises:
          UserError: no room for it, or the save before did not get onto the disk; what is already kept stays whole.
        """
        resumable = (last or step % self.config.every == 0) and step not in self._steps.all_steps()
        milestone = self.is_milestone(step) and step not in self._milestones.all_steps()
        if not (resumable or milestone):
            return
        self.wait()
        meta = {**self.meta, "step": step, "tokens": step * self.tokens_per_step}
        saves = []
        if resumable:
            saves.append((self._steps, _items(state, meta, trainer=True)))
        if milestone:
            saves.append((self._milestones, _items(state, meta, trainer=self.config.milestone_optimizer)))
        self._check_room(step, [items for _, items in saves])
        with self._disk_errors_told():
            for manager, items in saves:
                manager.save(step, args=items)

    def is_milestone(self, step: int) -> bool:
        """Whether `step` is the first at which one of the milestones is reached."""
        before, after = (step - 1) * self.tokens_per_step, step * self.tokens_per_step
        # Rounded, because 0.067 billion is 67,000,000.00000001 in floating point, and so would be reached a step late.
        return any(before < round(milestone * 1e9) <= after for milestone in self.config.milestones)

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
        """Block until what was begun is on disk, and what it displaced is gone.

        Raises:
          UserError: it could not be written; says where and why.
        """
        with self._disk_errors_told():
            self._steps.wait_until_finished()
            if self._milestones is not None:
                self._milestones.wait_until_finished()
        # Only now: the thread that saves also moves what it displaces into the trash.
        _empty_trash(self._steps.directory)

    def close(self) -> None:
        """Finish what was begun."""
        self.wait()
        self._steps.close()
        if self._milestones is not None:
            self._milestones.close()

    def _check_room(self, step: int, saves: list[ocp.args.Composite]) -> None:
        """Better before than in the middle of writing; the other processes write to the same disk."""
        arrays = [item.item for items in saves for name, item in items.items() if name != "meta"]
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        free = shutil.disk_usage(self.run_dir).free
        if free < needed and jax.process_index() == 0:
            raise UserError(f"no room for the checkpoint of step {step}: it takes {needed / 2**20:,.1f} MiB, and"
                            f" {self.run_dir} has {free / 2**20:,.1f} MiB free; {self._advice()}")

    @contextmanager
    def _disk_errors_told(self) -> Iterator[None]:
        """A disk's errors in a user's words. What is half written goes at once: it would keep the disk full."""
        try:
            yield
        except (OSError, ValueError) as error:
            # TensorStore raises ValueError, with the system's number in its text.
            number = re.search(r"os_error_code='(\d+)'", str(error))
            reason = os.strerror(int(number[1])) if number else getattr(error, "strerror", None)
            if reason is None:
                raise
            _remove_half_written(self.run_dir)
            raise UserError(f"a checkpoint could not be written below {self.run_dir}: {reason};"
                            f" {self._advice()}") from error

    def _advice(self) -> str:
        steps = [int(path.name) for path in (self.run_dir / CHECKPOINTS).iterdir() if path.name.isdigit()]
        goes_on = f"it goes on from step {max(steps)}" if steps else "nothing of this run is kept yet"
        return f"make room there and give the same command again: {goes_on}"


def write_weights(run_dir: Path, params: Any, *, meta: dict[str, Any]) -> None:
    """Keep weights for good, as a milestone at `meta["step"]`."""
    with _manager(run_dir / MILESTONES, None) as manager:
        manager.save(meta["step"], args=ocp.args.Composite(params=ocp.args.StandardSave(params),
                                                           meta=ocp.args.JsonSave(meta)))


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


def _remove_half_written(run_dir: Path) -> None:
    """Remove the folders of a failed save, until they have stayed away for a second (at most ten).

    TensorStore's threads may still be writing other arrays of it, and make a folder again that is gone.
    """
    until, quiet_since = time.monotonic() + 10, time.monotonic()
    while time.monotonic() < min(until, quiet_since + 1):
        for path in run_dir.glob("*/*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
            quiet_since = time.monotonic()
        time.sleep(0.05)


def _empty_trash(directory: Any) -> None:
    if jax.process_index() == 0:
        shutil.rmtree(Path(directory) / TRASH, ignore_errors=True)


def list_checkpoints(run_dir: Path) -> list[Kept]:
    """The finished checkpoints of a run, oldest first; a Hugging Face folder is one, at step 0.

    Raises:
      UserError: no run directory there, or a Hugging Face folder that cannot be read.
    """
    if huggingface.is_huggingface(run_dir):
        return [Kept(0, HUGGINGFACE, run_dir, huggingface.read_meta(run_dir), huggingface.weight_bytes(run_dir))]
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
    """The directory and the checkpoint that a MODEL names: a run (its newest), RUN@STEP, or a Hugging Face folder.

    Raises:
      UserError: no such run or step; the message lists the steps there are.
    """
    name, at, wanted = model.rpartition("@")
    run_dir = Path(name if at and wanted.isdigit() else model)
    if not run_dir.is_dir():
        raise UserError(f"no model {model}: {run_dir} is no directory (a MODEL is a run directory, RUN@STEP,"
                        " or a Hugging Face folder)")
    kept = list_checkpoints(run_dir)
    steps = sorted({checkpoint.step for checkpoint in kept})
    if not kept:
        raise UserError(f"no model {model}: {run_dir} has no checkpoint yet")
    step = int(wanted) if at and wanted.isdigit() else steps[-1]
    matching = [checkpoint for checkpoint in kept if checkpoint.step == step]
    if not matching:
        raise UserError(f"no model {model}: {run_dir} has no step {step}; it has {', '.join(map(str, steps))}")
    return run_dir, matching[-1]


def read_model_config(run_dir: Path) -> ModelConfig:
    """The architecture of a run, or of a Hugging Face folder."""
    if huggingface.is_huggingface(run_dir):
        return huggingface.read_config(run_dir)
    raw = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    return ModelConfig(**raw["model"])


def identify_model(checkpoint: Kept) -> dict[str, Any]:
    """Which model this is, wherever it lies: its step, and a hash of what its run was, how long, and started from."""
    was = [checkpoint.meta["fingerprint"], checkpoint.meta.get("init"), checkpoint.meta.get("steps")]
    if was[1] is not None:
        was[1] = {name: was[1][name] for name in ("step", "run_sha256")}
    return {"step": checkpoint.step, "run_sha256": hashlib.sha256(json.dumps(was, sort_keys=True).encode()).hexdigest()}


def describe_origin(checkpoint: Kept, *, run_dir: Path) -> dict[str, Any]:
    """What the run in `run_dir` keeps of the checkpoint that it starts from: where it lies, and which it is."""
    source = checkpoint.run_dir.absolute()
    return {"path": str(source), "relative": os.path.relpath(source, run_dir.absolute()), **identify_model(checkpoint)}


def find_base(origin: dict[str, Any], *, run_dir: Path, model: str | None = None) -> Kept:
    """The checkpoint that the adapters of a run belong to.

    Args:
      origin: from `describe_origin`.
      run_dir: where the adapters are now; the base may have been moved together with them.
      model: a MODEL that may be it, if it is not where it was.

    Raises:
      UserError: it is not there, or another model is; names both.
    """
    step = origin["step"]
    places = [f"{origin['path']}@{step}", f"{run_dir / origin['relative']}@{step}", *([model] if model else [])]
    problems = []
    for place in dict.fromkeys(places):
        try:
            _, base = find_checkpoint(place)
        except UserError as error:
            problems.append(str(error))
            continue
        if identify_model(base) == {name: origin[name] for name in ("step", "run_sha256")}:
            return base
        what = f"at step {base.step}" if base.step != step else "of a run with another config, data or beginning"
        problems.append(f"{place} is another model: it is {what}")
    told = [f"{run_dir} holds adapters of {origin['path']}@{step}, and this is what was found:", *problems]
    advice = f"\nput it back, or say where it is: python launch.py lora merge {run_dir} base=MODEL output=DIR"
    raise UserError("\n  ".join(told) + (advice if model is None else ""))


def load_params(checkpoint: Kept, abstract_params: Any, *, base: str | None = None) -> Any:
    """The weights of a checkpoint, laid out as the shardings of `abstract_params` say, in its dtypes.

    Adapters are merged into their base, which is looked for where it was, or is the MODEL `base`.

    Raises:
      UserError: parameters of other shapes than these, or no base; names each.
    """
    if checkpoint.meta.get("lora") is not None:
        return _load_merged(checkpoint, abstract_params, base=base)
    weights = huggingface.open_weights(checkpoint.path) if checkpoint.kind == HUGGINGFACE else None
    kept, wanted = (flatten(jax.tree.map(lambda x: list(x.shape), tree))
                    for tree in (weights.shapes() if weights else read_tree(checkpoint), abstract_params))
    differing = [f"{name}: {kept.get(name, 'absent')} there, {wanted.get(name, 'absent')} here"
                 for name in sorted({*kept, *wanted}) if kept.get(name) != wanted.get(name)]
    if differing:
        raise UserError("\n  ".join([f"the weights of {checkpoint.path} are of another model:", *differing]))
    return weights.load(abstract_params) if weights else _restore(checkpoint, abstract_params)


def load_whole(checkpoint: Kept, *, base: str | None = None) -> Any:
    """The weights of a checkpoint in float32 on the first device, adapters merged; as `load_params`."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.eval_shape(partial(init_params, read_model_config(checkpoint.run_dir)), jax.random.key(0))
    return load_params(checkpoint, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
                                                abstract), base=base)


def load_adapters(checkpoint: Kept, placed: Any = None) -> dict[str, dict[str, jax.Array]]:
    """The adapters of a LoRA run's checkpoint, `{query: {a, b}, …}`, float32, whole on each device of `placed`."""
    placed = placed or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(placed, jax.sharding.NamedSharding):
        placed = sharding.replicated(placed.mesh)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=placed),
                            read_tree(checkpoint))
    return _restore(checkpoint, abstract)["blocks"]


def _load_merged(checkpoint: Kept, abstract_params: Any, *, base: str | None) -> Any:
    found = find_base(checkpoint.meta["init"], run_dir=checkpoint.run_dir, model=base)
    scale = LoraConfig(**checkpoint.meta["lora"]).scale
    wanted = abstract_params["blocks"]
    adapters = load_adapters(checkpoint, next(iter(wanted.values())).sharding)
    # Sums are of float32, whatever is wanted; one projection after the other, so that few are there twice.
    wide = {name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding) if name in adapters else leaf
            for name, leaf in wanted.items()}
    params = load_params(found, {**abstract_params, "blocks": wide})
    for name, adapter in adapters.items():
        like = wanted[name]
        add = jax.jit(lambda weight, a, b, dtype: merge(weight, a, b, scale=scale).astype(dtype), static_argnums=3,
                      out_shardings=like.sharding)
        params["blocks"][name] = add(params["blocks"][name], adapter["a"], adapter["b"], like.dtype)
    return params


def read_tree(checkpoint: Kept) -> Any:
    """Shapes and dtypes of what is kept."""
    return ocp.PyTreeCheckpointHandler().metadata((checkpoint.path / "params").absolute()).tree


def _restore(checkpoint: Kept, abstract: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((checkpoint.path / "params").absolute(), abstract)
