"""Attention for XLA: blocks of queries, each against only the keys that it can see. No [S, S] mask, no repeated heads.

Legend: B batch, S queries, T keys, N query heads, K key and value heads, G query heads of one kv head, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MASKED = -1e30
"""Finite: a query that sees nothing then has a gradient of zero and not of NaN."""
KEEP_PROBABILITIES = 1024
"""Up to this many queries the probabilities are kept for the backward pass; beyond, each block computes them again."""


def block_size(length: int) -> int:
    """Queries of a block. Small blocks skip more of what is masked, large ones feed the matrix units better."""
    return 128 if length <= KEEP_PROBABILITIES else 512


def attention_xla(query_BSNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array, *,
                  segment_ids_BS: jax.Array | None, causal: bool, sliding_window: int | None, scale: float) -> jax.Array:
    """As `kernels.attention`."""
    batch, length, heads, head_dim = query_BSNH.shape
    kv_heads = key_BSKH.shape[2]
    query_BSKGH = query_BSNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    size = block_size(length)
    blocks = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        last = stop if causal else length
        first = 0 if sliding_window is None else max(0, start - sliding_window + 1)

        def attend(query, key, value, segments, start=start, stop=stop, first=first, last=last):
            mask = _mask(jnp.arange(start, stop)[:, None], jnp.arange(first, last)[None], causal=causal,
                         sliding_window=sliding_window)[None]
            if segments is not None:
                mask = mask & (segments[0][:, :, None] == segments[1][:, None, :])
            return _attend(query, key, value, mask, scale)

        if length > KEEP_PROBABILITIES:
            attend = jax.checkpoint(attend)
        segments = None if segment_ids_BS is None else (segment_ids_BS[:, start:stop], segment_ids_BS[:, first:last])
        blocks.append(attend(query_BSKGH[:, start:stop], key_BSKH[:, first:last], value_BSKH[:, first:last], segments))
    y_BSNH = jnp.concatenate(blocks, axis=1).reshape(query_BSNH.shape) if len(blocks) > 1 else blocks[0].reshape(query_BSNH.shape)
    if segment_ids_BS is not None:
        y_BSNH = jnp.where((segment_ids_BS > 0)[:, :, None, None], y_BSNH, 0)
    return y_BSNH


def cached_attention(query_BSNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array, *, query_positions: jax.Array,
                     sliding_window: int | None = None, scale: float | None = None) -> jax.Array:
    """Attention of new tokens to a cache that holds them too, each seeing the slots up to its own.

    Args:
      query_positions: int [B, S], the slot of each new token.
      sliding_window: slots that a token sees, its own included.

    Returns:
      [B, S, N, H] in the query's dtype.
    """
    batch, length, heads, head_dim = query_BSNH.shape
    kv_heads = key_BTKH.shape[2]
    slots = jnp.arange(key_BTKH.shape[1])[None, None]
    mask = _mask(query_positions[:, :, None], slots, causal=True, sliding_window=sliding_window)
    query = query_BSNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    y = _attend(query, key_BTKH, value_BTKH, mask, head_dim**-0.5 if scale is None else scale)
    return y.reshape(query_BSNH.shape)


def _mask(query, key, *, causal: bool, sliding_window: int | None):
    mask = key <= query if causal else (key == key) & (query == query)
    return mask if sliding_window is None else mask & (query - key < sliding_window)


def _attend(query_BSKGH, key_BTKH, value_BTKH, mask_BST, scale):
    scores = jnp.einsum("BSKGH,BTKH->BKGST", query_BSKGH, key_BTKH, preferred_element_type=jnp.float32) * scale
    probs = jax.nn.softmax(jnp.where(mask_BST[:, None, None], scores, MASKED), axis=-1)
    return jnp.einsum("BKGST,BTKH->BSKGH", probs.astype(value_BTKH.dtype), value_BTKH)
