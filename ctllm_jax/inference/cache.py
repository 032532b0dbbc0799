"""The compiled half of the engine: slots of keys and values, prefill of prompts, and sampling of tokens.

There are two programs. `prefill` computes tokens of some requests in their slots, after a prefix that may come from
another slot, and samples a first token. `decode` samples several tokens for all slots. Layers are separate arrays, so
that a step writes in place.

Legend: B slots, R requests, S new tokens, T tokens of a slot, K kv heads, H head dim, D hidden, V vocabulary, L layers,
Z stop ids, N likeliest tokens that are reported.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from ctllm_jax import sharding
from ctllm_jax.inference.request import MOST_TOLD
from ctllm_jax.inference.sampling import Drawn, Sampling, draw, score
from ctllm_jax.model.decoder import Block, Decoder, compute_logits, forward, split_blocks, stacked_blocks


class Slots(NamedTuple):
    """The cache of each slot: L arrays [B, K, T, H] of keys and of values; bool [B, V], ids that occurred."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    seen_BV: jax.Array


class Part(NamedTuple):
    """Tokens of R requests to prefill.

    Attributes:
      tokens: int32 [R, S], padded on the right.
      slot, source: int32 [R]; their slot, and the slot of the tokens before them; a slot out of range writes nothing.
      start, count: int32 [R]; number of tokens before them, and number of new tokens.
      targets: int32 [R, S]; the token after each, whose log-probability is requested.
    """

    tokens: Any
    slot: Any
    source: Any
    start: Any
    count: Any
    targets: Any


class Rows(NamedTuple):
    """State of each slot: its last token (not in the cache yet), number of tokens in the cache, number of tokens that
    it may still sample (0: inactive), int32 [B]; ids that end it, int32 [B, Z], -1 for none."""

    token: Any
    length: Any
    left: Any
    stop: Any


class Scores(NamedTuple):
    """Log-probabilities of `Part.targets` [R, S], and of the likeliest tokens [R, S, N] with their ids."""

    logp: jax.Array
    told_ids: jax.Array
    told_logps: jax.Array


def split_layers(params: Any, *, dtype: Any) -> Any:
    """The parameters with `blocks` as a tuple of one tree per layer, in `dtype`, so that no step slices a stack."""
    @partial(jax.jit, static_argnums=1)
    def take(stacks, layer):
        return jax.tree.map(lambda stack: stack[layer].astype(dtype), stacks)

    stacks = stacked_blocks(params)
    layers = tuple(take(stacks, layer) for layer in range(len(params["blocks"]["query"])))
    rest = {name: leaf.astype(dtype) for name, leaf in params.items() if name not in ("blocks", "lora")}
    return {**rest, "blocks": layers}


def cache_sharding(config: Any, mesh: Mesh | None, *, slots: int) -> NamedSharding | None:
    """Shard heads like the model's, and slots over the batch axes if these divide them."""
    if mesh is None:
        return None
    batch = sharding.BATCH_AXES if slots % sharding.axis_size(mesh, sharding.BATCH_AXES) == 0 else None
    return NamedSharding(mesh, PartitionSpec(batch, sharding.RULES["kv_heads"]))


def make_slots(config: Any, *, slots: int, length: int, dtype: Any, device: Any, mesh: Mesh | None = None) -> Slots:
    """Empty slots, on the device or over the mesh."""
    shape = (slots, config.num_kv_heads, length, config.head_dim)
    # Placed from the start like a step's results, so that programs are compiled once.
    out = cache_sharding(config, mesh, slots=slots) or SingleDeviceSharding(device)
    whole = sharding.replicated(mesh) if mesh is not None else out

    def make():
        empty = [tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)) for _ in range(2)]
        return Slots(*empty, jnp.zeros((slots, config.padded_vocab_size), bool))

    layers = (out,) * config.num_layers
    return jax.jit(make, out_shardings=Slots(layers, layers, whole))()


@partial(jax.jit, donate_argnums=0)
def mark_seen(slots: Slots, slot: Any, seen_V: Any) -> Slots:
    """Ids that count for a slot's repetition penalty."""
    return slots._replace(seen_BV=slots.seen_BV.at[slot].set(seen_V))


@partial(jax.jit, static_argnums=0, static_argnames=("span", "scores", "mesh"), donate_argnames="slots")
def prefill(decoder: Decoder, params: Any, slots: Slots, part: Part, sampling: Sampling, *, span: int, scores: bool,
            mesh: Mesh | None = None) -> tuple[Drawn, Scores | None, Slots]:
    """Prefill a part of some prompts; returns the token sampled after each (meaningful if the part ends the prompt).

    Args:
      sampling: arrays [R].
      span: number of tokens of a slot that attention reads: at least start + S.
      scores: whether the log-probabilities of `part.targets` are computed.
    """
    # Padding requests read slot 0, and write to a slot that does not exist.
    def gather(stack_BKTH):
        return stack_BKTH.at[part.source, :, :span].get(mode="clip")

    def scatter(stack_BKTH, rows_RKTH):
        return stack_BKTH.at[part.slot, :, :span].set(rows_RKTH, mode="drop")

    keys, values = jax.tree.map(gather, slots[:2])
    hidden_RSD, keys, values = _forward(decoder, params, part.tokens, keys, values, part.start, span)
    keys, values = jax.tree.map(scatter, slots[:2], (keys, values))
    last_RD = jnp.take_along_axis(hidden_RSD, (part.count - 1)[:, None, None], axis=1)[:, 0]
    seen_RV = slots.seen_BV.at[part.slot].get(mode="clip")
    drawn = draw(_logits(decoder, params, last_RD), sampling, seen_BV=seen_RV)
    seen_BV = slots.seen_BV.at[part.slot, drawn.token].set(True, mode="drop")
    scored = None
    if scores:
        requests, length, hidden = hidden_RSD.shape
        flat = score(_logits(decoder, params, hidden_RSD.reshape(-1, hidden)), part.targets.reshape(-1),
                     told=jnp.any(sampling.told > 0))
        scored = Scores(*(x.reshape(requests, length, *x.shape[1:]) for x in flat))
    return *_replicated((drawn, scored), mesh), _placed(decoder, Slots(keys, values, seen_BV), mesh)


@partial(jax.jit, static_argnums=0, static_argnames=("span", "steps", "mesh"), donate_argnames="slots")
def decode(decoder: Decoder, params: Any, slots: Slots, rows: Rows, sampling: Sampling, *, span: int, steps: int,
           mesh: Mesh | None = None) -> tuple[Drawn, Slots]:
    """Up to `steps` tokens for each slot: `Drawn` with arrays [steps, B, …].

    A row samples until one of its stop ids, or until its limit; later values are meaningless.

    Args:
      sampling: arrays [B].
      span: number of tokens of a slot that attention reads: at least the longest row's length + steps, or T.
    """
    slots_count, length = slots.keys[0].shape[0], slots.keys[0].shape[2]
    told = min(MOST_TOLD, decoder.config.padded_vocab_size)
    out = Drawn(jnp.zeros((steps, slots_count), jnp.int32), jnp.zeros((steps, slots_count), jnp.float32),
                jnp.zeros((steps, slots_count, told), jnp.int32), jnp.zeros((steps, slots_count, told), jnp.float32))

    def unfinished(carry):
        step, _, rows, _, _ = carry
        return (step < steps) & jnp.any(rows.left > 0)

    def advance(carry):
        step, slots, rows, index_B, out = carry
        active_B = rows.left > 0
        # An inactive row writes after its tokens, where the next token overwrites it.
        hidden_B1D, keys, values = _forward(decoder, params, rows.token[:, None], slots.keys, slots.values,
                                            jnp.minimum(rows.length, length - 1), span)
        drawn = draw(_logits(decoder, params, hidden_B1D[:, 0]), sampling._replace(index=index_B),
                     seen_BV=slots.seen_BV)
        seen_BV = slots.seen_BV.at[jnp.arange(slots_count), drawn.token].max(active_B)
        out = jax.tree.map(lambda whole, new: whole.at[step].set(new), out, drawn)
        stopped_B = jnp.any(drawn.token[:, None] == rows.stop, axis=1)
        rows = Rows(jnp.where(active_B, drawn.token, rows.token), rows.length + active_B,
                    jnp.where(active_B & ~stopped_B, rows.left - 1, 0), rows.stop)
        return step + 1, Slots(keys, values, seen_BV), rows, index_B + active_B, out

    start = (jnp.int32(0), slots, Rows(*map(jnp.asarray, rows)), jnp.asarray(sampling.index), out)
    _, slots, _, _, out = jax.lax.while_loop(unfinished, advance, start)
    return _replicated(out, mesh), _placed(decoder, slots, mesh)


def _forward(decoder: Decoder, params: Any, tokens_BS, keys, values, start_B, span: int):
    """Hidden states [B, S, D], and keys and values with the new tokens written behind `start_B` others."""
    positions_BS = start_B[:, None] + jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)[None]
    block = Block(decoder.config, decoder.attention, decoder.swiglu, cache_span=span, parent=None)

    def apply_block(layer, x_BSD, angles, cached):
        return block.apply({"params": layer}, x_BSD, angles, None, (*cached, start_B))

    if isinstance(params["blocks"], dict):
        params = {**params, "blocks": split_blocks(params, decoder.config.num_layers)}
    hidden_BSD, written = forward(decoder, params, tokens_BS, positions_BS, apply_block, zip(keys, values, strict=True))
    return hidden_BSD, *map(tuple, zip(*written, strict=True))


def _logits(decoder: Decoder, params: Any, hidden_BD: jax.Array) -> jax.Array:
    return compute_logits(params, hidden_BD, vocab_size=decoder.config.vocab_size)


def _replicated(tree: Any, mesh: Mesh | None) -> Any:
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, sharding.replicated(mesh))


def _placed(decoder: Decoder, slots: Slots, mesh: Mesh | None) -> Slots:
    if mesh is None:
        return slots
    place = cache_sharding(decoder.config, mesh, slots=slots.keys[0].shape[0])
    return Slots(*jax.lax.with_sharding_constraint(slots[:2], place), _replicated(slots.seen_BV, mesh))
