"""What a project that takes single functions writes: `mypy --strict` finds nothing in it."""

from typing import assert_type

import jax
import jax.numpy as jnp

from ctllm_jax.kernels import attention, swiglu
from ctllm_jax.losses.cross_entropy import chunked_cross_entropy, token_logps
from ctllm_jax.losses.preference import Answers, pair_logps, preference_loss, sequence_logps


def attend(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
    assert_type(attention(query, key, value, causal=False, bias=jnp.zeros((1, 1, 1, 1))), jax.Array)
    y, lse = attention(query, key, value, segment_ids=segment_ids, sliding_window=32, return_lse=True,
                       implementation="xla", scale=jnp.float32(0.5))
    assert_type(lse, jax.Array)
    return y


def feed_forward(x: jax.Array, gate: jax.Array, up: jax.Array) -> jax.Array:
    return swiglu(x, gate, up, implementation="auto", recompute=False)


def losses(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    loss, weight, sums = chunked_cross_entropy(hidden, head, targets, weights, z_loss=1e-4, rings="off")
    assert_type(sums, dict[str, jax.Array])
    return loss / weight, token_logps(hidden, head, targets, chunk_size=8)


def dpo(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, segment_ids: jax.Array,
        pair_ids: jax.Array, is_chosen: jax.Array) -> jax.Array:
    logps, lengths = sequence_logps(hidden, head, targets, weights, segment_ids, num_segments=4, chunk_size=8)
    chosen, rejected, counts = pair_logps(Answers(logps, lengths, logps), pair_ids, is_chosen)
    assert_type(chosen, Answers)
    loss, pairs, _ = preference_loss(chosen, rejected, kind="sigmoid", beta=jnp.float32(0.1), weights=counts)
    return loss / pairs
