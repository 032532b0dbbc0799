"""Training of adapters: what is differentiated, and what the base is kept as meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.model.decoder import init_params
from ctllm_jax.model.lora import attach
from ctllm_jax.training.optimizer import is_matrix, path_name


def with_adapters(loss_fn: Callable, *, scale: float) -> Callable:
    """A stage's `(params, frozen, batch)` loss with adapters as what is trained, and the base's weights as frozen."""
    return lambda adapters, base, batch: loss_fn(attach(base, adapters, scale=scale), None, batch)


def abstract_base(config: PretrainConfig, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of the frozen weights: matrices are kept in `compute.dtype`, the others in float32.

    The forward pass takes matrices in that dtype anyway, so nothing changes, bit for bit, and bfloat16 halves them.
    """
    def keep(path: Any, leaf: Any, sharding: Any) -> Any:
        dtype = config.compute.dtype if is_matrix(path_name(path), leaf.ndim) else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    abstract = jax.eval_shape(partial(init_params, config.model), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(keep, abstract, shardings)
