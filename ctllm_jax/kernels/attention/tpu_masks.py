"""Shared parts of both TPU passes: the scalars of a pair of blocks, and the mask inside it.

Legend: Q queries of a block, T keys of a block, C columns of a table.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ctllm_jax.kernels.attention.fused import Request
from ctllm_jax.kernels.attention.tpu_blocks import LANES
from ctllm_jax.kernels.attention.tpu_ranges import COLUMNS

MASKED = -1e38
"""A masked score. It is far below the initial running maximum, so that a fully masked query sums to zero, not to
one."""
LOG2_E = 1.4426950408889634
"""Scores are multiplied by log2 e, because the chip's exponential has base 2; the factor is folded into the scale."""


def matmul(x, y, *, contract: tuple[int, int]):
    """Matmul accumulated in float32; float32 inputs are multiplied in float32, not rounded to bfloat16."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, (((contract[0],), (contract[1],)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)


def read_row(table_ref, index):
    """The C scalars of one block."""
    return [table_ref[index * COLUMNS + column] for column in range(COLUMNS)]


def needs_mask(request: Request) -> bool:
    """Whether any pair of tokens can be masked."""
    return request.causal or request.segments


def to_column(row_1Q):
    """Convert a [1, Q] row to [Q, 128], each number repeated along its row."""
    return jnp.broadcast_to(row_1Q, (LANES, row_1Q.shape[1])).T


def tile_lanes(column, width: int):
    """[Q, 128] -> [Q, width], where all columns are equal."""
    return column[:, :width] if width < LANES else jnp.tile(column, (1, width // LANES))


def places(start, length: int, *, column: bool):
    """Indices of a block's tokens in their row, as a [length, 128] column or a [1, length] row."""
    shape = (length, LANES) if column else (1, length)
    return start + jax.lax.broadcasted_iota(jnp.int32, shape, 0 if column else 1)


def visible(request: Request, *, positions, segments):
    """Whether a query attends to a key: bool, of the shape that the pairs broadcast to.

    Args:
      positions: (of queries, of keys); None: they mask nothing.
      segments: the same; None: not given.
    """
    mask = None
    if positions is not None:
        query, key = positions
        mask = key <= query
        if request.sliding_window is not None:
            mask &= key > query - request.sliding_window
    if segments is not None:
        same = segments[0] == segments[1]
        mask = same if mask is None else mask & same
    return mask
