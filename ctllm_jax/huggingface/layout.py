"""Our parameters under the names of transformers' Llama, Mistral and Qwen2: slices, reshapes and transposes alone.

RoPE is half-split on both sides. Theirs is a tensor a layer, [out, in]; ours are stacks over the layers, [L, in, out].

Legend: D hidden, N query heads, K kv heads, H head dim, F FFN, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctllm_jax.config.model import ModelConfig
from ctllm_jax.model.parameters import Parameter, decoder_parameters, paths

MODULES = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
           "out": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
"""A projection's name here -> its module in a layer of transformers' Llama."""
_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_OUTSIDE = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
VOCABULARY = ("embedding", "head")
"""Parameters with a row or column for each id."""


@dataclass(frozen=True)
class Piece:
    """A Hugging Face tensor, and its place in our parameters.

    Attributes:
      path: our parameter, such as `blocks/query`.
      layer: index into our first dim; None if it has no layers.
      name: their name.
      matrix: their shape.
    """

    path: str
    layer: int | None
    name: str
    matrix: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """A Hugging Face tensor in the shape of ours (of one layer); a view if possible."""
        return (tensor.T if self.transposed else tensor).reshape(self.shape)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Ours (of one layer) in the shape of theirs: a view."""
        if not self.transposed:
            return array.reshape(self.matrix)
        return array.reshape(self.matrix[::-1]).T


def pieces(config: ModelConfig) -> list[Piece]:
    """All tensors of a model in the order in which they are computed."""
    table = paths(decoder_parameters(config))
    layers = [_piece(path, parameter, layer) for layer in range(config.num_layers)
              for path, parameter in table.items() if path.startswith("blocks/")]
    outside = {path: _piece(path, table[path], None) for path in _OUTSIDE if path in table}
    return [outside.pop("embedding"), *layers, *outside.values()]


def _piece(path: str, parameter: Parameter, layer: int | None) -> Piece:
    shape = parameter.shape if layer is None else parameter.shape[1:]
    own = path.removeprefix("blocks/")
    if layer is None:
        name, matrix = _OUTSIDE[path], shape[::-1] if path == "head" else shape
        return Piece(path, None, name, matrix, shape, path == "head")
    prefix = f"model.layers.{layer}."
    if own in _NORMS:
        return Piece(path, layer, f"{prefix}{_NORMS[own]}.weight", shape, shape, False)
    if own.endswith("_bias"):
        return Piece(path, layer, f"{prefix}{MODULES[own.removesuffix('_bias')]}.bias", (int(np.prod(shape)),), shape,
                     False)
    # `out` has its inputs in two dims, the others in one.
    inputs = 2 if own == "out" else 1
    matrix = (int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs])))
    return Piece(path, layer, f"{prefix}{MODULES[own]}.weight", matrix, shape, True)
