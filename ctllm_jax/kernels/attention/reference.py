"""Attention in its textbook form: dense, float32, one mask. For tests, and for reading.

Legend: B batch, S queries, T keys, N query heads, K key and value heads, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention_mask(length: int, *, segment_ids: jax.Array | None, causal: bool, sliding_window: int | None,
                   positions: jax.Array | None = None) -> jax.Array:
    """The mask: bool [B or 1, S, S], whether a query attends to a key (last dim). A query of segment 0 attends to
    nothing."""
    places = jnp.arange(length)[None] if positions is None else positions
    query, key = places[:, :, None], places[:, None, :]
    mask = jnp.ones((1, length, length), bool)
    if causal:
        mask = mask & (key <= query)
    if sliding_window is not None:
        mask = mask & (query - key < sliding_window)
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, :, None] > 0)
    return mask


def attention_reference(query_BSNH, key_BSKH, value_BSKH, *, segment_ids=None, causal=True, sliding_window=None,
                        scale=None, positions=None) -> jax.Array:
    """softmax(q kᵀ · scale) v over the unmasked keys (arXiv 1706.03762); a fully masked query gives zeros."""
    heads, kv_heads, head_dim = query_BSNH.shape[2], key_BSKH.shape[2], query_BSNH.shape[3]
    query, key, value = (x.astype(jnp.float32) for x in (query_BSNH, key_BSKH, value_BSKH))
    key, value = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (key, value))
    scores_BNST = jnp.einsum("BSNH,BTNH->BNST", query, key) * (head_dim**-0.5 if scale is None else scale)
    mask = attention_mask(query.shape[1], segment_ids=segment_ids, causal=causal,
                          sliding_window=sliding_window, positions=positions)[:, None]
    probs_BNST = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores_BNST, -1e30), axis=-1), 0)
    return jnp.einsum("BNST,BTNH->BSNH", probs_BNST, value).astype(query_BSNH.dtype)
