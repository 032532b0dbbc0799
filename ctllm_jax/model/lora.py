"""Low-rank adapters of a block's projections: y = x·W + scale · (x·A)·B, where W is frozen (LoRA, arXiv 2106.09685).

Adapters are kept separate from the weights in training and never added to them: the gradient of the sum would cost as
much memory as W, and half of the FLOPs of the backward pass. Legend: B batch, S sequence, L layers, R rank.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ctllm_jax.config.errors import UserError
from ctllm_jax.model.parameters import ZEROS, Parameter, block_parameters, decoder_parameters, paths

if TYPE_CHECKING:
    from ctllm_jax.config.lora import LoraConfig
    from ctllm_jax.config.model import ModelConfig

PROJECTIONS = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1}
"""Name of each projection that can be adapted -> number of its leading input dims; the others are outputs."""


def lora_parameters(config: ModelConfig, lora: LoraConfig) -> dict[str, Any]:
    """The tree of all adapters, `{blocks: {query: {a: [L, in …, R], b: [L, R, out …]}, …}}`, as in `model.parameters`.

    A is drawn from a normal with PEFT's variance, 1 / (3 · inputs), and B is zero, so the first step has the base's
    outputs.

    Args:
      config: the fields of ModelConfig.
      lora: the fields of LoraConfig.

    Raises:
      UserError: `lora.targets` matches no projection, or matches another parameter.
    """
    known = [f"blocks/{name}" for name in PROJECTIONS]
    hit = [path for path in paths(decoder_parameters(config)) if re.search(lora.targets, path)]
    others = [path for path in hit if path not in known]
    if others or not hit:
        found = f"hits {', '.join(others)}" if others else "hits no parameter"
        raise UserError(f"lora.targets={lora.targets!r} {found}: what can be adapted is {', '.join(known)}")
    blocks, layers = block_parameters(config), config.num_layers
    adapters = {}
    for name in (path.removeprefix("blocks/") for path in hit):
        (shape, dims), inputs = (blocks[name].shape, blocks[name].dims), PROJECTIONS[name]
        std = 1 / math.sqrt(3 * math.prod(shape[:inputs]))
        adapters[name] = {
            "a": Parameter((layers, *shape[:inputs], lora.rank), ("layers", *dims[:inputs], "rank"), std),
            "b": Parameter((layers, lora.rank, *shape[inputs:]), ("layers", "rank", *dims[inputs:]), ZEROS)}
    return {"blocks": adapters}


def count_adapters(config: ModelConfig, lora: LoraConfig) -> int:
    """Return the number of trained parameters."""
    return sum(parameter.size for parameter in paths(lora_parameters(config, lora)).values())


def attach(params: Any, adapters: Any, *, scale: float) -> dict[str, Any]:
    """Combine the decoder's parameters and adapters into the variables of `Decoder`; the scale is multiplied into B."""
    return {**params, "lora": {name: {"a": adapter["a"], "b": adapter["b"] * scale}
                               for name, adapter in adapters["blocks"].items()}}


def adapter_output(x: jax.Array, adapter: dict[str, jax.Array]) -> jax.Array:
    """x·A·B of one layer, [B, S, out …] in x's dtype."""
    a, b = adapter["a"].astype(x.dtype), adapter["b"].astype(x.dtype)
    return jnp.tensordot(jnp.tensordot(x, a, a.ndim - 1), b, 1)


def merge(weight: jax.Array, a: jax.Array, b: jax.Array, *, scale: float) -> jax.Array:
    """W + scale · A·B of all layers, in float32."""
    layers, rank = b.shape[:2]
    product = jnp.matmul(a.reshape(layers, -1, rank), b.reshape(layers, rank, -1), precision="highest")
    return weight.astype(jnp.float32) + scale * product.reshape(weight.shape)
