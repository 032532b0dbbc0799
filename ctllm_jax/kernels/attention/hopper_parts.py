"""Shared parts of the three Hopper attention kernels: their position in the grid, and the mask.

Legend: R the 64 rows of a group, C the columns of a step.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
"""Layout of one number per row of an array that wgmma returns."""
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def place(index: jax.Array, *, tiles: int, heads: int, last_first: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (tile, head, row of the batch) of a thread block; tiles are consecutive, optionally in reverse order."""
    tile, rest = lax.rem(index, jnp.int32(tiles)), lax.div(index, jnp.int32(tiles))
    if last_first:
        tile = tiles - 1 - tile
    return tile, lax.rem(rest, jnp.int32(heads)), lax.div(rest, jnp.int32(heads))


def filled(number: float, shape: tuple[int, ...]) -> jax.Array:
    """Fill one float32 number into the layout of an array that wgmma returns, or of one number per row."""
    layout = BY_ROW if len(shape) == 1 else plgpu.Layout.WGMMA
    return plgpu.layout_cast(jnp.full(shape, number, jnp.float32), layout)


def broadcast_columns(x_R: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Broadcast one number per row to every column."""
    return lax.broadcast_in_dim(x_R, shape, [0])


def broadcast_rows(x_C: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Broadcast one number per column to every row."""
    return lax.broadcast_in_dim(x_C, shape, [1])


def hide_unseen(scores_RC: jax.Array, *, row_start, column_start, row_ids, column_ids, causal: bool,
                sliding_window: int | None, by_key: bool = False) -> jax.Array:
    """Return the scores, -inf where a key is masked; rows are queries, or keys with `by_key`.

    Args:
      row_start, column_start: their offsets in the sequence.
      row_ids, column_ids: references to their segments; padding queries and padding keys have different numbers.
    """
    shape = scores_RC.shape[0], scores_RC.shape[1]
    row_ids_R, column_ids_C = plgpu.load(row_ids, (), layout=BY_ROW), plgpu.load(column_ids, (), layout=BY_COLUMN)
    same = broadcast_columns(row_ids_R, shape) == broadcast_rows(column_ids_C, shape)
    scores_RC = jnp.where(same, scores_RC, -jnp.inf)
    if causal:
        # The barrier prevents segments and columns from occupying registers at the same time.
        scores_RC = lax.optimization_barrier(scores_RC)
        rows_R = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=BY_ROW) + (row_start - column_start)
        rows = broadcast_columns(rows_R, shape)
        columns = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        seen = columns >= rows if by_key else columns <= rows
        if sliding_window is not None:
            farthest = broadcast_columns(rows_R + (sliding_window if by_key else -sliding_window), shape)
            seen &= columns < farthest if by_key else columns > farthest
        scores_RC = jnp.where(seen, scores_RC, -jnp.inf)
    return scores_RC
