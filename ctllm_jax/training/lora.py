"""Training of adapters: the loss, the dtypes of the base, and the run directory of a merged model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import yaml

from ctllm_jax.config.load import read_values
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.data.tokenizer import find_tokenizer
from ctllm_jax.huggingface.tokenizer import SETTINGS
from ctllm_jax.model.decoder import init_params
from ctllm_jax.model.lora import attach
from ctllm_jax.training.checkpoints.checkpoint import Kept
from ctllm_jax.training.checkpoints.checkpointer import write_weights
from ctllm_jax.training.optimizer import is_matrix, path_name


def with_adapters(loss_fn: Callable, *, scale: float) -> Callable:
    """Convert a stage's `(params, frozen, batch)` loss: adapters are trained, and the base's weights are frozen."""
    return lambda adapters, base, batch: loss_fn(attach(base, adapters, scale=scale), None, batch)


def abstract_base(config: PretrainConfig, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of the frozen weights: matrices are stored in `compute.dtype`, others in float32.

    The forward pass uses matrices in that dtype anyway, so results are equal bit for bit, and bfloat16 halves their
    size.
    """
    def keep(path: Any, leaf: Any, sharding: Any) -> Any:
        dtype = config.compute.dtype if is_matrix(path_name(path), leaf.ndim) else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    abstract = jax.eval_shape(partial(init_params, config.model), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(keep, abstract, shardings)


def write_merged(checkpoint: Kept, params: Any, directory: Path) -> None:
    """Write a run directory of merged weights: the config without `lora`, the tokenizer, and one checkpoint, a
    milestone.

    Its `meta` is that of the adapters' checkpoint without `lora`: the same model, at the same step.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_weights(directory, params, meta={name: value for name, value in checkpoint.meta.items() if name != "lora"})
    if (tokenizer := find_tokenizer(checkpoint.run_dir)) is not None:
        shutil.copyfile(tokenizer, directory / tokenizer.name)
    if (checkpoint.run_dir / SETTINGS).is_dir():
        shutil.copytree(checkpoint.run_dir / SETTINGS, directory / SETTINGS)
    # Last: a folder is a run directory once it has its config.
    config = read_values(checkpoint.run_dir / "config.yaml")
    config |= {"lora": None, "run": {"dir": str(directory)}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False, width=100),
                                           encoding="utf-8")
