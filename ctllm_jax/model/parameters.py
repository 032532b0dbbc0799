"""Every parameter of the decoder on one line: shape, logical dims, initial weights. No jax.

Legend: D hidden, N query heads, K key and value heads, H head dim, F feed-forward, V padded vocabulary, L layers.
Weights are stored [in, out] in float32; the blocks are stacked along a leading L.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctllm_jax.config.model import ModelConfig

ONES, ZEROS = "ones", "zeros"


@dataclass(frozen=True)
class Parameter:
    """A parameter's shape, the logical names of its dims, and its initial values: standard deviation of a normal, ONES
    or ZEROS."""

    shape: tuple[int, ...]
    dims: tuple[str | None, ...]
    init: float | str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def block_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """The parameters of one block, without the leading L.

    Args:
      config: anything with the fields of `ctllm_jax.config.model.ModelConfig`.
    """
    D, N, K, H, F = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.ffn_size
    std = config.init_std
    # Output projections are initialized smaller, so that the residual stream's variance does not grow with depth
    # (Megatron-LM).
    out_std = std / math.sqrt(2 * config.num_layers)
    table = {
        "attention_norm": Parameter((D,), ("norm",), ONES),
        "query": Parameter((D, N, H), ("embed", "heads", "head_dim"), std),
        "key": Parameter((D, K, H), ("embed", "kv_heads", "head_dim"), std),
        "value": Parameter((D, K, H), ("embed", "kv_heads", "head_dim"), std),
        "out": Parameter((N, H, D), ("heads", "head_dim", "embed"), out_std),
        "ffn_norm": Parameter((D,), ("norm",), ONES),
        "gate": Parameter((D, F), ("embed", "ffn"), std),
        "up": Parameter((D, F), ("embed", "ffn"), std),
        "down": Parameter((F, D), ("ffn", "embed"), out_std),
    }
    if config.qkv_bias:
        table |= {
            "query_bias": Parameter((N, H), ("heads", "head_dim"), ZEROS),
            "key_bias": Parameter((K, H), ("kv_heads", "head_dim"), ZEROS),
            "value_bias": Parameter((K, H), ("kv_heads", "head_dim"), ZEROS),
        }
    return table


def decoder_parameters(config: ModelConfig) -> dict[str, Any]:
    """The tree of all parameters: `{embedding, blocks: {...}, final_norm, head}`; no head if it is tied."""
    V, D, L = config.padded_vocab_size, config.hidden_size, config.num_layers
    table: dict[str, Any] = {
        "embedding": Parameter((V, D), ("vocab", "embed"), config.init_std),
        "blocks": {
            name: Parameter((L, *parameter.shape), ("layers", *parameter.dims), parameter.init)
            for name, parameter in block_parameters(config).items()
        },
        "final_norm": Parameter((D,), ("norm",), ONES),
    }
    if not config.tie_embeddings:
        table["head"] = Parameter((D, V), ("embed", "vocab"), config.init_std)
    return table


def paths(tree: dict[str, Any], prefix: str = "") -> dict[str, Parameter]:
    """The table flattened: `blocks/query` -> Parameter."""
    flat: dict[str, Parameter] = {}
    for name, entry in tree.items():
        flat |= paths(entry, f"{prefix}{name}/") if isinstance(entry, dict) else {prefix + name: entry}
    return flat


def count_parameters(config: ModelConfig) -> int:
    """Return the number of parameters, including the padded rows of the vocabulary."""
    return sum(parameter.size for parameter in paths(decoder_parameters(config)).values())
