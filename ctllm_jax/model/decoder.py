"""The decoder of CT-LLM: pre-RMSNorm, RoPE, grouped-query attention, SwiGLU (a Llama), as pure Linen modules.

`Decoder(config).apply({"params": params}, tokens, segment_ids, positions)` returns the normalized hidden states; the
loss applies the head, and never stores all logits. Parameters are float32 and stacked over layers, whether the blocks
are scanned or unrolled. Low-rank adapters (`model.lora.attach`) can be added as the collection `lora`.

Legend: B batch, S sequence, T cached sequence, D hidden, N query heads, K kv heads, H head dim, F FFN, V vocabulary,
L layers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from ctllm_jax import kernels
from ctllm_jax.kernels.attention import cached_attention
from ctllm_jax.kernels.swiglu import activate
from ctllm_jax.model.lora import adapter_output
from ctllm_jax.model.parameters import ONES, Parameter, block_parameters, decoder_parameters
from ctllm_jax.model.rope import apply_rope, rope_angles

if TYPE_CHECKING:
    from jax.typing import DTypeLike

    from ctllm_jax.config.model import ModelConfig

SAVED_NAMES = ("query", "key", "value", "attention_output", "attention_log_sums")
"""Names of the arrays that `remat="attention"` saves in addition to a block's input: everything that the backward pass
of attention reads. Attention itself assigns the last two names."""


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far: two [L, B, K, T, H] arrays, and each row's length [B], int32."""

    key: jax.Array
    value: jax.Array
    length: jax.Array


def make_cache(config: ModelConfig, *, rows: int, length: int, dtype: DTypeLike) -> Cache:
    """Make an empty cache for `rows` rows of at most `length` tokens."""
    shape = (config.num_layers, rows, config.num_kv_heads, length, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((rows,), jnp.int32))


def initializer(path: str, parameter: Parameter) -> Callable[[jax.Array], jax.Array]:
    """`key -> array`, float32. The key is folded with a number derived from the path, so parameters are independent of
    each other."""
    def init(key: jax.Array) -> jax.Array:
        if isinstance(parameter.init, str):
            return jnp.full(parameter.shape, float(parameter.init == ONES), jnp.float32)
        key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return parameter.init * jax.random.normal(key, parameter.shape, jnp.float32)
    return init


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Initialize all parameters, float32: a pure function of config and key, to be jitted with the mesh's shardings."""
    return init_table(decoder_parameters(config), key)


def init_table(table: dict[str, Any], key: jax.Array, prefix: str = "") -> dict[str, Any]:
    """The parameters of a table (of `model.parameters`, `model.lora`), float32."""
    return {name: init_table(entry, key, f"{prefix}{name}/") if isinstance(entry, dict)
            else initializer(prefix + name, entry)(key) for name, entry in table.items()}


def rms_norm(x: jax.Array, scale_D: jax.Array, *, eps: float) -> jax.Array:
    """x / rms(x) · scale over the last dim, in float32, returned in x's dtype (arXiv 1910.07467)."""
    x_f32 = x.astype(jnp.float32)
    normed = x_f32 * jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    return (normed * jnp.expand_dims(scale_D, tuple(range(x.ndim - 1)))).astype(x.dtype)


def project(x: jax.Array, weights: Sequence[jax.Array], dims: Sequence[tuple[str | None, ...]]) -> list[jax.Array]:
    """x·W for each W [in …, out …], whose `dims` are the names of `model.parameters`; x is [B, S, in …]."""
    return [jnp.tensordot(x, weight, x.ndim - 2) for weight in weights]


class Block(nn.Module):
    """One decoder block: x + attention(norm(x)), then + ffn(norm(.)).

    Attributes:
      config: the fields of ModelConfig.
      attention: `(q_BSNH, k_BSKH, v_BSKH, *, segment_ids, sliding_window) -> [B, S, N, H]`, causal.
      swiglu: `(x_BSD, gate_DF, up_DF) -> [B, S, F]`.
      project: a replacement of `project` for weights that are sharded over a mesh.
      remat_ffn: recompute the FFN's wide activations in the backward pass.
      prevent_cse: as of `jax.checkpoint`; False inside a scan.
      cache_span: number of cache slots that attention reads; None: all. No row may be longer.
    """

    config: ModelConfig
    attention: Callable = kernels.attention
    swiglu: Callable = kernels.swiglu
    project: Callable = project
    remat_ffn: bool = False
    prevent_cse: bool = True
    cache_span: int | None = None

    @nn.compact
    def __call__(self, x_BSD, angles, segment_ids_BS=None, cache=None):
        """Returns (x_BSD, the block's (key_BKTH, value_BKTH) with the new tokens written, or None without a cache)."""
        config, dtype = self.config, x_BSD.dtype
        table = block_parameters(config)
        weights = {name: self.param(name, initializer(name, parameter)).astype(dtype)
                   for name, parameter in table.items()}
        adapters = self.get_variable("params", "lora", {})
        norm = partial(rms_norm, eps=config.norm_eps)

        def project(x, *names, weights=weights, adapters=adapters):
            found = self.project(x, [weights[name] for name in names], [table[name].dims for name in names])
            return [y + adapter_output(x, adapters[name]) if name in adapters else y
                    for name, y in zip(names, found, strict=True)]

        normed_BSD = norm(x_BSD, weights["attention_norm"])
        q_BSNH, k_BSKH, v_BSKH = project(normed_BSD, "query", "key", "value")
        if config.qkv_bias:
            q_BSNH += weights["query_bias"][None, None]
            k_BSKH += weights["key_bias"][None, None]
            v_BSKH += weights["value_bias"][None, None]
        q_BSNH = checkpoint_name(apply_rope(q_BSNH, angles), "query")
        k_BSKH = checkpoint_name(apply_rope(k_BSKH, angles), "key")
        v_BSKH = checkpoint_name(v_BSKH, "value")
        if cache is None:
            y_BSNH = self.attention(q_BSNH, k_BSKH, v_BSKH, segment_ids=segment_ids_BS,
                                    sliding_window=config.sliding_window)
        else:
            y_BSNH, cache = self._attend_to_cache(q_BSNH, k_BSKH, v_BSKH, cache)
        x_BSD = x_BSD + project(y_BSNH, "out")[0]

        def ffn(x_BSD, weights, adapters):
            normed_BSD = norm(x_BSD, weights["ffn_norm"])
            if "gate" in adapters or "up" in adapters:
                # Adapters add their output before the activation, which is inside the fused kernel.
                wide_BSF = activate(*project(normed_BSD, "gate", "up", weights=weights, adapters=adapters))
            else:
                wide_BSF = self.swiglu(normed_BSD, weights["gate"], weights["up"])
            return project(wide_BSF, "down", weights=weights, adapters=adapters)[0]

        if self.remat_ffn:
            ffn = jax.checkpoint(ffn, prevent_cse=self.prevent_cse)
        return x_BSD + ffn(x_BSD, weights, adapters), cache

    def _attend_to_cache(self, q_BSNH, k_BSKH, v_BSKH, cache):
        """Write the new tokens at the end of each row's cache; each attends to all earlier tokens and itself."""
        key_BKTH, value_BKTH, length_B = cache
        write = jax.vmap(lambda row_KTH, new_KSH, start: jax.lax.dynamic_update_slice(row_KTH, new_KSH, (0, start, 0)))
        key_BKTH = write(key_BKTH, jnp.moveaxis(k_BSKH, 1, 2).astype(key_BKTH.dtype), length_B)
        value_BKTH = write(value_BKTH, jnp.moveaxis(v_BSKH, 1, 2).astype(value_BKTH.dtype), length_B)
        slots_BS = length_B[:, None] + jnp.arange(q_BSNH.shape[1], dtype=jnp.int32)[None]
        y_BSNH = cached_attention(q_BSNH, key_BKTH[:, :, :self.cache_span], value_BKTH[:, :, :self.cache_span],
                                  query_positions=slots_BS, sliding_window=self.config.sliding_window)
        return y_BSNH, (key_BKTH, value_BKTH)


class Decoder(nn.Module):
    """Token ids to hidden states.

    Attributes:
      config: the fields of ModelConfig.
      dtype: of activations and matmul inputs; norms and softmax are float32 inside.
      attention, swiglu, project: as of `Block`.
      scan_layers: scan one compiled block over the layers, else unroll.
      remat: "none", "ffn", "attention" or "block": what the backward pass recomputes, from least to most.
      constrain: `(x_BSD) -> x_BSD`, applies the mesh's sharding to the hidden states.
      embed: `(embedding_VD, tokens_BS) -> [B, S, D]`, for an embedding that is sharded over a mesh; None: a plain
        lookup.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    attention: Callable = kernels.attention
    swiglu: Callable = kernels.swiglu
    project: Callable = project
    scan_layers: bool = False
    remat: str = "none"
    constrain: Callable = lambda x_BSD: x_BSD
    embed: Callable | None = None

    @nn.compact
    def __call__(self, tokens_BS, segment_ids_BS=None, positions_BS=None, cache: Cache | None = None):
        """Hidden states after the final norm.

        Args:
          tokens_BS: int32 ids.
          segment_ids_BS: int32, 0 for padding; None: one document per row, no padding. With a cache, nonzero ids mark
            the valid new tokens (padding on the right is written, and overwritten by the next tokens).
          positions_BS: int32 positions for RoPE; None: 0 … S-1, or following the cached ones.
          cache: from `make_cache`, at most T - S tokens full; None outside of decoding.

        Returns:
          (hidden_BSD in `dtype`, the cache with the new tokens, or None).
        """
        config = self.config
        table = decoder_parameters(config)
        embedding_VD = self.param("embedding", initializer("embedding", table["embedding"]))
        blocks = self.param("blocks", lambda key: {name: initializer(f"blocks/{name}", parameter)(key)
                                                   for name, parameter in table["blocks"].items()})
        final_norm_D = self.param("final_norm", initializer("final_norm", table["final_norm"]))
        if "head" in table:
            self.param("head", initializer("head", table["head"]))
        params = {"embedding": embedding_VD, "final_norm": final_norm_D, "blocks": blocks,
                  "lora": self.get_variable("params", "lora", {})}

        if positions_BS is None:
            start_B1 = jnp.zeros((1, 1), jnp.int32) if cache is None else cache.length[:, None]
            positions_BS = start_B1 + jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)[None]

        def apply_block(params, x_BSD, angles, keys_values):
            layer_cache = keys_values and (*keys_values, cache.length)
            x_BSD, layer_cache = self._block().apply({"params": params}, x_BSD, angles, segment_ids_BS, layer_cache)
            return self.constrain(x_BSD), layer_cache

        keys_values: Any = cache and (cache.key, cache.value)  # stacked, or a list of layers
        if not self.scan_layers:
            keys_values = [cache and (cache.key[layer], cache.value[layer]) for layer in range(config.num_layers)]
            params = {**params, "blocks": split_blocks(params, config.num_layers)}
        hidden_BSD, layer_caches = forward(self, params, tokens_BS, positions_BS, self._rematerialised(apply_block),
                                           keys_values)
        if cache is not None:
            if not self.scan_layers:
                layer_caches = jax.tree.map(lambda *parts: jnp.stack(parts), *layer_caches)
            new_B = jnp.sum(segment_ids_BS > 0, axis=1) if segment_ids_BS is not None else tokens_BS.shape[1]
            key, value = layer_caches
            cache = Cache(key, value, cache.length + jnp.asarray(new_B, jnp.int32))
        return hidden_BSD, cache

    def _block(self) -> Block:
        return Block(self.config, self.attention, self.swiglu, self.project, remat_ffn=self.remat == "ffn",
                     prevent_cse=not self.scan_layers, parent=None)

    def _rematerialised(self, function: Callable) -> Callable:
        """Wrap `function` in the selected remat policy. Inside a scan, XLA cannot merge the two computations anyway."""
        policies = {"none": None, "ffn": None,
                    "attention": jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES),
                    "block": jax.checkpoint_policies.nothing_saveable}
        if self.remat not in policies:
            raise ValueError(f"remat={self.remat!r}: must be one of {', '.join(policies)}")
        policy = policies[self.remat]
        return function if policy is None else jax.checkpoint(function, policy=policy, prevent_cse=not self.scan_layers)


def stacked_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of all blocks, stacked over layers, with their adapters."""
    return {**params["blocks"], "lora": params.get("lora", {})}


def split_blocks(params: dict[str, Any], num_layers: int) -> Iterator[dict[str, Any]]:
    """The parameters of each block.

    `split` and not an index: its transpose is one concatenation, where L indices would add L padded stacks.
    """
    leaves, structure = jax.tree.flatten(stacked_blocks(params))
    slices = [jax.lax.split(stack, [1] * num_layers) for stack in leaves]
    for layer in range(num_layers):
        yield jax.tree.unflatten(structure, [jnp.squeeze(parts[layer], 0) for parts in slices])


def forward(decoder: Decoder, params: dict[str, Any], tokens_BS: jax.Array, positions_BS: jax.Array,
            apply_block: Callable, each_layer: Any = None) -> tuple[jax.Array, Any]:
    """Hidden states after the final norm, and the second output of `apply_block` for all layers.

    Args:
      params: of the decoder. `blocks` is a dict of stacks, which are scanned, or has the parameters of each layer.
      apply_block: `(params of a layer, x_BSD, angles, its entry of each_layer) -> (x_BSD, output)`.
      each_layer: arrays [L, …] for a scan, else one entry for each layer. The outputs have the same form.
    """
    config = decoder.config
    angles = rope_angles(positions_BS, head_dim=config.head_dim, theta=config.rope_theta)
    # Cast after the lookup: a cast table would be a second copy of the largest parameter.
    embed = decoder.embed or partial(jnp.take, axis=0)
    x_BSD = decoder.constrain(embed(params["embedding"], tokens_BS).astype(decoder.dtype))
    if isinstance(params["blocks"], dict):
        x_BSD, outputs = jax.lax.scan(lambda x_BSD, layer: apply_block(layer[0], x_BSD, angles, layer[1]), x_BSD,
                                      (stacked_blocks(params), each_layer))
    else:
        outputs = []
        for layer, entry in zip(params["blocks"], each_layer, strict=True):
            x_BSD, output = apply_block(layer, x_BSD, angles, entry)
            outputs.append(output)
    return rms_norm(x_BSD, params["final_norm"], eps=config.norm_eps), outputs


def head_weights(params: dict[str, Any]) -> jax.Array:
    """The output head [D, V], float32: its own parameter, or the embedding's transpose if tied."""
    return params["head"] if "head" in params else params["embedding"].T


def compute_logits(params: dict[str, Any], hidden_ND: jax.Array, *, vocab_size: int) -> jax.Array:
    """Float32 [N, V], -inf for ids that pad the vocabulary. The losses compute them by chunks instead."""
    head_DV = head_weights(params)
    logits_NV = jnp.einsum("ND,DV->NV", hidden_ND.astype(head_DV.dtype), head_DV, preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(logits_NV.shape[1])[None] < vocab_size, logits_NV, -jnp.inf)
