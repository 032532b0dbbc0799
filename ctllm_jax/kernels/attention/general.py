"""Attention for XLA of what the blocks of `xla` do not take: a bias, and keys of another length than the queries.

A block of queries at a time meets all keys, and its scores are computed again in the backward pass. Everything is
differentiated by JAX itself, so forward mode works here.

Legend: B batch, S queries, T keys, N query heads, K key and value heads, G query heads of one kv head, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ctllm_jax.kernels.attention.xla import LOOPED_BLOCK, MASKED, from_blocks, in_blocks


def attention_general(query_BSNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array, *, bias_BNST: jax.Array | None,
                      segment_ids: jax.Array | None, kv_segment_ids: jax.Array | None, positions: jax.Array | None,
                      kv_positions: jax.Array | None, causal: bool, sliding_window: int | None, scale: float
                      ) -> tuple[jax.Array, jax.Array]:
    """(y, lse) as of `kernels.attention`; of a query that sees nothing, zeros and -1e30."""
    length, kv_length, kv_heads = query_BSNH.shape[1], key_BTKH.shape[1], key_BTKH.shape[2]
    places_BS = jnp.arange(length)[None] if positions is None else positions
    places_BT = jnp.arange(kv_length)[None] if kv_positions is None else kv_positions

    def attend(query_BSNH, places_BS, segments_BS, bias_BNST):
        batch, length, heads, head_dim = query_BSNH.shape
        query = query_BSNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
        scores = jnp.einsum("BSKGH,BTKH->BKGST", query, key_BTKH, preferred_element_type=jnp.float32) * scale
        if bias_BNST is not None:
            bias = bias_BNST.astype(jnp.float32)
            rows, bias_heads, *rest = bias.shape
            scores += bias.reshape(rows, min(bias_heads, kv_heads), -1, *rest)
        distances_BST = places_BS[:, :, None] - places_BT[:, None]
        mask_BST = distances_BST >= 0 if causal else jnp.ones((1, length, kv_length), bool)
        if sliding_window is not None:
            mask_BST &= distances_BST < sliding_window
        if segments_BS is not None:
            mask_BST &= (segments_BS[:, :, None] == kv_segment_ids[:, None]) & (segments_BS > 0)[:, :, None]
        # Also where a bias of -inf masks all keys: a softmax of only -inf would be NaN.
        scores = jnp.where(mask_BST[:, None, None], jnp.maximum(scores, MASKED), MASKED)
        sees = jnp.max(scores, axis=-1, keepdims=True) > MASKED
        probs = jnp.where(sees, jax.nn.softmax(scores, axis=-1), 0).astype(value_BTKH.dtype)
        y = jnp.einsum("BKGST,BTKH->BSKGH", probs, value_BTKH, preferred_element_type=jnp.float32)
        lse_BKGS = jnp.where(sees[..., 0], jax.nn.logsumexp(scores, axis=-1), MASKED)
        return (y.reshape(query_BSNH.shape).astype(query_BSNH.dtype),
                lse_BKGS.reshape(batch, heads, length).swapaxes(1, 2))

    if length <= LOOPED_BLOCK:
        return attend(query_BSNH, places_BS, segment_ids, bias_BNST)
    by_query = bias_BNST is not None and bias_BNST.shape[2] > 1
    blocks = [None if x is None else in_blocks(x, dim) for x, dim in (
        (query_BSNH, 1), (places_BS, 1), (segment_ids, 1), (bias_BNST if by_query else None, 2))]

    @jax.checkpoint
    def attend_block(block):
        query, places, segments, bias = block
        return attend(query, places, segments, bias if by_query else bias_BNST)

    y, lse = jax.lax.map(attend_block, blocks)
    return from_blocks(y, 1, length), from_blocks(lse, 1, length)
