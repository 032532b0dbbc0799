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


def visible(request: Request, shape: tuple[int, int], *, query_dim: int, starts, segments, positions):
    """Bool of `shape`, whether a query sees a key; query_dim says which of the dims is theirs.

    Args:
      starts: (first query, first key) of the blocks, in their row; for a causal order by place.
      segments, positions: (of queries, of keys), each of a shape that broadcasts to `shape`; None: not given.
    """
    mask = None
    if request.causal:
        if positions is None:
            # How far the key lies behind the query, less what the blocks themselves lie apart.
            behind = (jax.lax.broadcasted_iota(jnp.int32, shape, query_dim)
                      - jax.lax.broadcasted_iota(jnp.int32, shape, 1 - query_dim))
            nearest = starts[1] - starts[0]
        else:
            behind, nearest = positions[0] - positions[1], 0
        mask = behind >= nearest
        if request.sliding_window is not None:
            mask &= behind < nearest + request.sliding_window
    if segments is not None:
        same = segments[0] == segments[1]
        mask = same if mask is None else mask & same
    return mask
