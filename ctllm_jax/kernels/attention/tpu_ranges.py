"""Visible blocks of keys for each block of queries, from the lowest and highest ids of each block: a few numbers per
block, which the kernels read as scalars. No array of size [S, S] is made.

Legend: B rows (1 if neither segments nor positions are given, because all rows are then equal), S sequence, I blocks of
queries, J blocks of keys, C columns of a table.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ctllm_jax.kernels.attention.fused import Request

BIG = 2**30
QUERY_PADDING, KEY_PADDING = -1, -2
"""The number used for segment 0: padding attends to nothing, and nothing attends to it."""
COLUMNS = 5
_SEGMENT_LOWEST, _SEGMENT_FIRST, _SEGMENT_LAST, _FIRST, _LAST = range(COLUMNS)


class Ranges(NamedTuple):
    """Flat int32 tables.

    Attributes:
      query: [B I C], for each block of queries.
      key: [B J C], for each block of keys.
      seen: [B I 2], first and end of the blocks of keys that a block of queries attends to; 0, 0: none.
      rows: the number of rows in each table: 1, or all rows.
    """

    query: jax.Array
    key: jax.Array
    seen: jax.Array
    rows: int


def find_ranges(request: Request, segment_ids_BS: jax.Array | None, positions_BS: jax.Array | None, *, length: int,
                query_block: int, key_block: int) -> Ranges:
    """Build the tables of ids padded to `length`, a multiple of both block sizes."""
    places_BS = jnp.arange(length, dtype=jnp.int32)[None] if positions_BS is None else positions_BS
    segments_BS = jnp.ones((1, 1), jnp.int32) if segment_ids_BS is None else segment_ids_BS
    segments_BS, places_BS = jnp.broadcast_arrays(
        jnp.broadcast_to(segments_BS, (segments_BS.shape[0], length)), places_BS)
    query_BIC, key_BJC = (_block_table(segments_BS, places_BS, block) for block in (query_block, key_block))
    seen_BIJ = can_see(request, [x[:, :, None] for x in jnp.moveaxis(query_BIC, 2, 0)],
                       [x[:, None] for x in jnp.moveaxis(key_BJC, 2, 0)])
    seen_BIJ = jnp.broadcast_to(seen_BIJ, (segments_BS.shape[0], query_BIC.shape[1], key_BJC.shape[1]))
    blocks = seen_BIJ.shape[2]
    first_BI = jnp.argmax(seen_BIJ, axis=2)
    stop_BI = jnp.where(jnp.any(seen_BIJ, axis=2), blocks - jnp.argmax(seen_BIJ[:, :, ::-1], axis=2), 0)
    seen_BI2 = jnp.stack([first_BI, stop_BI], axis=2).astype(jnp.int32)
    return Ranges(query_BIC.reshape(-1), key_BJC.reshape(-1), seen_BI2.reshape(-1), segments_BS.shape[0])


def can_see(request: Request, query, key):
    """Whether a token of one block may attend to one of the other. False is always correct; True may be too cautious.
    Takes a table's columns, or scalars."""
    seen = (query[_SEGMENT_FIRST] <= key[_SEGMENT_LAST]) & (key[_SEGMENT_FIRST] <= query[_SEGMENT_LAST])
    if request.causal:
        seen &= key[_FIRST] <= query[_LAST]
    if request.sliding_window is not None:
        seen &= key[_LAST] > query[_FIRST] - request.sliding_window
    return seen


def sees_all(request: Request, query, key):
    """Whether every query of one block attends to every key of the other, so that no mask is needed."""
    same = (query[_SEGMENT_LOWEST] == key[_SEGMENT_LAST]) & (key[_SEGMENT_LOWEST] == query[_SEGMENT_LAST])
    same &= (query[_SEGMENT_LOWEST] == query[_SEGMENT_LAST]) & (query[_SEGMENT_LOWEST] > 0)
    if request.causal:
        same &= key[_LAST] <= query[_FIRST]
    if request.sliding_window is not None:
        same &= key[_FIRST] > query[_LAST] - request.sliding_window
    return same


def _block_table(segments_BS, places_BS, block: int):
    """[B, blocks, C]. Padding enters only the lowest segment, which therefore shows whether there is any."""
    segments, places = (x.reshape(x.shape[0], -1, block) for x in (segments_BS, places_BS))
    real = segments > 0
    return jnp.stack([
        jnp.min(segments, axis=2), jnp.min(jnp.where(real, segments, BIG), axis=2),
        jnp.max(jnp.where(real, segments, -1), axis=2), jnp.min(places, axis=2), jnp.max(places, axis=2),
    ], axis=2).astype(jnp.int32)
