"""What the TPU kernels of both passes share: scalars of a pair of blocks, and the mask inside of it.

Legend: Q queries of a block, T keys of a block, C columns of a table.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ctllm_jax.kernels.attention.fused import Request
from ctllm_jax.kernels.attention.tpu_blocks import LANES
from ctllm_jax.kernels.attention.tpu_ranges import COLUMNS

MASKED = -1e38
"""A masked score. Far below where running maxima start, so that a query that sees nothing sums to zero, not to one."""
LOG2_E = 1.4426950408889634
"""Scores are kept times log2 e: the chip's own exponential is of base 2, and the factor goes into the scale."""


def matmul(x, y, *, contract: tuple[int, int]):
    """Accumulated in float32; float32 inputs are multiplied as such, not rounded to bfloat16."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, (((contract[0],), (contract[1],)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)


def read_row(table_ref, index):
    """The C scalars of one block."""
    return [table_ref[index * COLUMNS + column] for column in range(COLUMNS)]


def needs_mask(request: Request) -> bool:
    """Whether any pair of tokens can be hidden from each other."""
    return request.causal or request.segments


def to_column(row_1Q):
    """A [1, Q] row as [Q, 128], each number all along its row."""
    return jnp.broadcast_to(row_1Q, (LANES, row_1Q.shape[1])).T


def tile_lanes(column, width: int):
    """[Q, 128] -> [Q, width], of columns that are all the same."""
    return column[:, :width] if width < LANES else jnp.tile(column, (1, width // LANES))


def places(start, length: int, *, column: bool):
    """The places of a block's tokens in their row, as a [length, 128] column or a [1, length] row."""
    shape = (length, LANES) if column else (1, length)
    return start + jax.lax.broadcasted_iota(jnp.int32, shape, 0 if column else 1)


def visible(request: Request, *, positions, segments):
    """Whether a query sees a key: bool, of the shape that the pairs broadcast to.

    Args:
      positions: (of queries, of keys); None: nothing is hidden by them.
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
