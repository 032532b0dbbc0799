"""Attention of new tokens to a cache, for decoding: dense over its slots.

Legend: B batch, S new tokens, T slots, N query heads, K key and value heads, G query heads of one kv head, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MASKED = -1e30


def cached_attention(query_BSNH: jax.Array, key_BKTH: jax.Array, value_BKTH: jax.Array, *, query_positions: jax.Array,
                     sliding_window: int | None = None, scale: float | None = None) -> jax.Array:
    """Attention of new tokens to a cache that already contains them; each attends to the slots up to its own.

    In the cache, heads precede slots, as the matmuls need them; otherwise a CPU would copy the whole cache for each
    token (242 against 65 us for 16 rows of 128 slots and 8 heads of 32).

    Args:
      query_positions: int [B, S], the slot of each new token.
      sliding_window: number of slots that a token attends to, including its own.

    Returns:
      [B, S, N, H] in the query's dtype.

    Raises:
      ValueError: shapes or dtypes do not match.
    """
    for name, array in (("query", query_BSNH), ("key", key_BKTH), ("value", value_BKTH)):
        if array.ndim != 4 or not jnp.issubdtype(array.dtype, jnp.floating) or not array.shape[3]:
            raise ValueError(f"cached attention: {name} {array.dtype.name}{array.shape} must be an array of floats with"
                             " four dims, and a head dim of at least 1")
    batch, length, heads, head_dim = query_BSNH.shape
    kv_heads = key_BKTH.shape[1]
    fits = key_BKTH.shape == value_BKTH.shape and (key_BKTH.shape[0], key_BKTH.shape[3]) == (batch, head_dim)
    if not fits or not kv_heads or heads % kv_heads or query_positions.shape != (batch, length):
        raise ValueError(f"cached attention: key {key_BKTH.shape}, value {value_BKTH.shape} and positions"
                         f" {query_positions.shape} do not fit to query {query_BSNH.shape}")
    own, slots = query_positions[:, :, None], jnp.arange(key_BKTH.shape[2])[None, None]
    mask_BST = slots <= own
    if sliding_window is not None:
        mask_BST &= slots > own - sliding_window
    query_BSKGH = query_BSNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("BSKGH,BKTH->BKGST", query_BSKGH, key_BKTH, preferred_element_type=jnp.float32)
    scores *= head_dim**-0.5 if scale is None else scale
    probs = jax.nn.softmax(jnp.where(mask_BST[:, None, None], scores, MASKED), axis=-1)
    return jnp.einsum("BKGST,BKTH->BSKGH", probs.astype(value_BKTH.dtype), value_BKTH).reshape(query_BSNH.shape)
