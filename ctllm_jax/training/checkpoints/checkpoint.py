"""Checkpoints on disk: a list of them, the checkpoint that a MODEL names, and its weights.

RUN/checkpoints/STEP/ holds a resumable step: `params`, `trainer` (optimizer state and counters), `meta` (JSON).
RUN/milestones/STEP/ holds weights that are never deleted: `params` and `meta`. Loading a MODEL reads only `params` and
`meta`. A LoRA run's `params` are its adapters; `meta` names the MODEL that they belong to, and loading merges the two.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import yaml
from pydantic import ValidationError

from ctllm_jax import sharding
from ctllm_jax.cluster.distributed import tell_all
from ctllm_jax.config.errors import UserError, check_format
from ctllm_jax.config.load import FORMAT as CONFIG_FORMAT
from ctllm_jax.config.load import FORMAT_KEY
from ctllm_jax.config.lora import LoraConfig
from ctllm_jax.config.model import ModelConfig
from ctllm_jax.config.types import fill_absent, parse_yaml
from ctllm_jax.huggingface import model as huggingface
from ctllm_jax.model.decoder import init_params
from ctllm_jax.model.lora import merge
from ctllm_jax.storage import absolute, in_parallel, is_remote, open_path, read_small
from ctllm_jax.training.checkpoints.files import (
    CHECKPOINTS,
    FORMAT,
    MANIFEST,
    MILESTONES,
    find_damage,
    list_steps,
    measure_size,
    say_damage,
)
from ctllm_jax.training.checkpoints.fingerprint import flatten

HUGGINGFACE = "huggingface"
_checked: set[tuple[Path, int]] = set()
"""Weights that this process has verified: the step, and when its manifest was written."""


@dataclass(frozen=True)
class Kept:
    """A checkpoint on disk."""

    step: int
    kind: str
    path: Path
    meta: dict[str, Any]

    @cached_property
    def size(self) -> int:
        """Total bytes of its files; makes one stat call per file."""
        return huggingface.weight_bytes(self.path) if self.kind == HUGGINGFACE else measure_size(self.path)

    @property
    def run_dir(self) -> Path:
        """The run directory of the checkpoint; a Hugging Face folder is its own."""
        return self.path if self.kind == HUGGINGFACE else self.path.parent.parent


def list_checkpoints(run_dir: Path) -> list[Kept]:
    """The finished checkpoints of a run, oldest first; a Hugging Face folder counts as one, at step 0.

    `meta` is empty if it cannot be read.

    Raises:
      UserError: no run directory there, a checkpoint of a newer format, or a Hugging Face folder that cannot be read.
    """
    if huggingface.is_huggingface(run_dir):
        return [Kept(0, HUGGINGFACE, run_dir, huggingface.read_meta(run_dir))]
    return _read_metas(_list_folders(run_dir))


def _list_folders(run_dir: Path) -> list[tuple[int, str, Path]]:
    """(step, kind, path) of every finished step of a run, sorted."""
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is no run directory: it has no config.yaml")
    kinds = ((CHECKPOINTS, "resumable"), (MILESTONES, "milestone"))
    return sorted((int(path.name), kind, path) for folder, kind in kinds for path in list_steps(run_dir, folder))


def _read_metas(folders: Sequence[tuple[int, str, Path]]) -> list[Kept]:
    """Read the meta of each step in parallel; a folder that is not a step is left out."""
    files = [path / "meta" / "metadata" for _, _, path in folders]
    if files and is_remote(files[0]):
        found = read_small(files)
        texts = [found.get(file, b"") for file in files]
    else:
        texts = in_parallel(_read_if_step, files)
    kept = []
    for (step, kind, path), text in zip(folders, texts, strict=True):
        if text is not None:
            try:
                meta = json.loads(text)
            except ValueError:
                meta = {}  # damaged: an error is raised when the step is used
            check_format(meta.get("format", 1), newest=FORMAT, where=path)
            kept.append(Kept(step, kind, path, meta))
    return kept


def _read_if_step(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return b"" if file.is_file() or (file.parent.parent / MANIFEST).is_file() else None


def find_checkpoint(model: str) -> tuple[Path, Kept]:
    """Return the directory and the checkpoint that a MODEL names: a run (its newest), RUN@STEP, or a Hugging Face
    folder.

    Raises:
      UserError: there is no such run or step; the message lists the existing steps.
    """
    name, at, wanted = model.rpartition("@")
    run_dir = open_path(name if at and wanted.isdigit() else model)
    if is_remote(run_dir):
        if not (run_dir / "config.yaml").is_file():
            raise UserError(f"no model {model}: there is no {run_dir}/config.yaml (a MODEL on an object store is a run"
                            " directory, or RUN@STEP; copy a Hugging Face folder to this machine)")
    elif not run_dir.is_dir():
        raise UserError(f"no model {model}: {run_dir} is no directory (a MODEL is a run directory, RUN@STEP,"
                        " or a Hugging Face folder)")
    wanted = int(wanted) if at and wanted.isdigit() else None
    if huggingface.is_huggingface(run_dir):
        matching = list_checkpoints(run_dir) if not wanted else []
    else:
        folders, matching = _list_folders(run_dir), []
        for step in sorted({step for step, _, _ in folders} if wanted is None else {wanted}, reverse=True):
            # Nothing is read from other steps.
            matching = matching or _read_metas([folder for folder in folders if folder[0] == step])
    if not matching:
        steps = sorted({checkpoint.step for checkpoint in list_checkpoints(run_dir)})
        if not steps:
            raise UserError(f"no model {model}: {run_dir} has no checkpoint yet")
        raise UserError(f"no model {model}: {run_dir} has no step {wanted}; it has {', '.join(map(str, steps))}")
    if not matching[-1].meta:
        refuse_damage(matching[-1])
        raise UserError(f"{matching[-1].path}/meta/metadata is damaged: it does not say what this is a checkpoint of")
    trained = matching[-1].meta.get("fingerprint", {}).get("config", {}).get("model")
    wanted = _as_model(trained, matching[-1].path) if trained is not None else None
    if wanted is not None and wanted != (found := read_model_config(run_dir)):
        differing = [f"model.{name}: {value} in the checkpoint, {getattr(found, name)} in config.yaml"
                     for name, value in wanted if getattr(found, name) != value]
        raise UserError("\n  ".join([f"{matching[-1].path} was trained as another model than {run_dir}/config.yaml"
                                     " describes:", *differing]))
    return run_dir, matching[-1]


def read_model_config(run_dir: Path) -> ModelConfig:
    """The architecture of a run, or of a Hugging Face folder."""
    if huggingface.is_huggingface(run_dir):
        return huggingface.read_config(run_dir)
    path = run_dir / "config.yaml"
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
        check_format(values.get(FORMAT_KEY, 1), newest=CONFIG_FORMAT, where=path, key=FORMAT_KEY)
        model = values["model"]
    except UserError:
        raise
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} describes no model, and a run's config.yaml does; restore it from a copy") from None
    return _as_model(model, path)


def _as_model(values: Any, path: Path) -> ModelConfig:
    try:
        return ModelConfig(**fill_absent(ModelConfig, values))
    except ValidationError as error:
        problems = "; ".join(f"model.{'.'.join(map(str, each['loc']))}={each['input']!r:.80}: {each['msg']}"
                             for each in error.errors())
        raise UserError(f"{path} describes a model that this version cannot read ({problems}); use the version of"
                        " ctllm_jax that wrote it") from None
    except (TypeError, ValueError):
        raise UserError(f"{path}: model={values!r:.80} must be a mapping of keys to values") from None


def identify_model(checkpoint: Kept) -> dict[str, Any]:
    """Identity of a model, independent of its path: its step, and a hash of its run's config, data, length and init."""
    was = [checkpoint.meta["fingerprint"], checkpoint.meta.get("init"), checkpoint.meta.get("steps")]
    if was[1] is not None:
        was[1] = {name: was[1][name] for name in ("step", "run_sha256")}
    return {"step": checkpoint.step, "run_sha256": hashlib.sha256(json.dumps(was, sort_keys=True).encode()).hexdigest()}


def describe_origin(checkpoint: Kept, *, run_dir: Path) -> dict[str, Any]:
    """The record that the run in `run_dir` keeps of the checkpoint that it starts from: its path and identity."""
    source = absolute(checkpoint.run_dir)
    apart = is_remote(source) or is_remote(run_dir)
    relative = str(source) if apart else os.path.relpath(source, absolute(run_dir))
    return {"path": str(source), "relative": relative, **identify_model(checkpoint)}


def find_base(origin: dict[str, Any], *, run_dir: Path, model: str | None = None) -> Kept:
    """The checkpoint that the adapters of a run belong to.

    Args:
      origin: from `describe_origin`.
      run_dir: current place of the adapters; the base may have been moved together with them.
      model: a MODEL that may be it, if it has moved.

    Raises:
      UserError: it is missing, or is another model; the message names both.
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


def refuse_damage(checkpoint: Kept) -> None:
    """Compare the files of a checkpoint's weights with its manifest, once per process; without a manifest, nothing is
    compared. This costs little more than loading, which then reads the files from the page cache.

    Raises:
      UserError: the files are damaged; the message names them and the other steps.
    """
    manifest = checkpoint.path / MANIFEST
    if checkpoint.kind == HUGGINGFACE or not manifest.exists():
        return
    known = absolute(checkpoint.path), manifest.stat().mtime if is_remote(manifest) else manifest.stat().st_mtime_ns
    if known in _checked:
        return
    problems = (find_damage(checkpoint.path, parts=("params", "meta")) or []) if jax.process_index() == 0 else []
    if tell_all(int(bool(problems))):
        others = sorted({other.step for other in list_checkpoints(checkpoint.run_dir)} - {checkpoint.step})
        said = say_damage(problems) if problems else "the first process says what"
        raise UserError(f"the weights of {checkpoint.path} are damaged: {said}; "
                        + (f"{checkpoint.run_dir} also has step {', '.join(map(str, others))} (RUN@STEP)" if others else
                           f"{checkpoint.run_dir} has no other step")
                        + f". Without its {MANIFEST} nothing is compared, and they are loaded as they are")
    _checked.add(known)


def load_params(checkpoint: Kept, abstract_params: Any, *, base: str | None = None) -> Any:
    """Load the weights of a checkpoint with the shardings and dtypes of `abstract_params`.

    Adapters are merged into their base, which is found at its recorded path, or is the MODEL `base`.

    Raises:
      UserError: files are damaged, shapes differ, or there is no base; the message names each.
    """
    refuse_damage(checkpoint)
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
    """Load the weights of a checkpoint in float32 on the first device, with adapters merged; see `load_params`."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.eval_shape(partial(init_params, read_model_config(checkpoint.run_dir)), jax.random.key(0))
    return load_params(checkpoint, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
                                                abstract), base=base)


def load_adapters(checkpoint: Kept, placed: Any = None) -> dict[str, dict[str, jax.Array]]:
    """The adapters of a LoRA run's checkpoint, `{query: {a, b}, …}`, float32, replicated on each device of `placed`."""
    refuse_damage(checkpoint)
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
    # Sums are computed in float32 for any target dtype, one projection at a time, to limit memory.
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
    """Shapes and dtypes of the stored arrays."""
    return ocp.PyTreeCheckpointHandler().metadata(absolute(checkpoint.path / "params")).tree


def _restore(checkpoint: Kept, abstract: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(absolute(checkpoint.path / "params"), abstract)
