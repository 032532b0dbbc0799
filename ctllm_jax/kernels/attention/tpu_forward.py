"""The forward pass on TPU: a block of queries loops over its visible keys with an online softmax (FlashAttention-2,
arXiv 2307.08691).

Legend: B rows, N query heads, K kv heads, S sequence, H head dim, Q queries of a block, T keys of a block.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ctllm_jax.kernels.attention.fused import NOTHING_SEEN, Request
from ctllm_jax.kernels.attention.tpu_blocks import LANES, Blocks
from ctllm_jax.kernels.attention.tpu_masks import (
    LOG2_E,
    MASKED,
    matmul,
    needs_mask,
    places,
    read_row,
    tile_lanes,
    to_column,
    visible,
)
from ctllm_jax.kernels.attention.tpu_ranges import Ranges, can_see, sees_all


def forward_kernel(request: Request, blocks: Blocks, ranges: Ranges, query_BNSH, key_BKSH, value_BKSH, ids, *,
                   vmem_limit: int, cost: pl.CostEstimate, interpret):
    """(y_BNSH, lse_BN1S) of arrays whose S is a multiple of both blocks and of `key_major`.

    `ids` are segment ids, then positions, of those that are given: pairs (of queries, of keys) of int32 [B, 1, S].
    """
    batch, heads, length, head_dim = query_BNSH.shape
    group = heads // key_BKSH.shape[1]
    block, held = blocks.query, blocks.key_major
    query_blocks, majors = length // block, length // held

    def query_place(b, n, i, j, *tables):
        return b, n, i, 0

    def held_keys(b, i, j, seen_ref):
        """The keys to hold: the nearest that the block attends to, so that none are copied unnecessarily."""
        row = _row(ranges.rows > 1, b, query_blocks) + i
        first, stop = seen_ref[2 * row], seen_ref[2 * row + 1]
        per_major = held // blocks.key
        return jnp.clip(j, jax.lax.div(first, per_major), jax.lax.div(jnp.maximum(stop - 1, first), per_major))

    def key_place(b, n, i, j, seen_ref, *tables):
        return b, jax.lax.div(n, group), held_keys(b, i, j, seen_ref), 0

    query_spec = pl.BlockSpec((None, None, block, head_dim), query_place)
    key_spec = pl.BlockSpec((None, None, held, head_dim), key_place)
    query_ids = pl.BlockSpec((None, 1, block), lambda b, n, i, j, *tables: (b, 0, i))
    key_ids = pl.BlockSpec((None, 1, held), lambda b, n, i, j, seen_ref, *tables: (b, 0, held_keys(b, i, j, seen_ref)))
    return pl.pallas_call(
        partial(_kernel, request, blocks, ranges.rows > 1, len(ids)), name="attention_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=(batch, heads, query_blocks, majors),
            in_specs=[query_spec, key_spec, key_spec, *[query_ids, key_ids] * len(ids)],
            out_specs=[query_spec, pl.BlockSpec((None, None, 1, block), lambda b, n, i, j, *tables: (b, n, 0, i))],
            scratch_shapes=[pltpu.VMEM((block, head_dim), jnp.float32)] + [pltpu.VMEM((block, LANES), jnp.float32)] * 2
            + [pltpu.VMEM((block, LANES), jnp.int32)] * len(ids)),
        out_shape=[jax.ShapeDtypeStruct(query_BNSH.shape, query_BNSH.dtype),
                   jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
                                             vmem_limit_bytes=vmem_limit),
        cost_estimate=cost, interpret=interpret,
    )(ranges.seen, ranges.query, ranges.key, query_BNSH, key_BKSH, value_BKSH, *[x for pair in ids for x in pair])


def _row(many_rows: bool, b, blocks: int):
    """Offset of a row's blocks in a table."""
    return b * blocks if many_rows else 0


def _kernel(request, blocks, many_rows, num_ids, seen_ref, query_table_ref, key_table_ref, query_ref, key_ref,
            value_ref, *refs):
    id_refs, (y_ref, lse_ref, sum_ref, highest_ref, total_ref, *columns) = refs[:2 * num_ids], refs[2 * num_ids:]
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    majors = pl.num_programs(3)
    per_major = blocks.key_major // blocks.key
    query_row = _row(many_rows, b, pl.num_programs(2)) + i
    key_row = _row(many_rows, b, majors * per_major)

    @pl.when(j == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        highest_ref[...] = jnp.full_like(highest_ref, NOTHING_SEEN)
        total_ref[...] = jnp.zeros_like(total_ref)
        for column_ref, row_ref in zip(columns, id_refs[::2], strict=True):
            column_ref[...] = to_column(row_ref[...])

    def meet(here, block, masked: bool):
        """Process one block of keys: index `here` in VMEM, `block` in its row."""
        keys = pl.ds(pl.multiple_of(here * blocks.key, blocks.key), blocks.key)
        scores_QT = matmul(query_ref[...], key_ref[keys, :], contract=(1, 1)) * (request.scale * LOG2_E)
        if masked:
            pairs = [(tile_lanes(column_ref[...], blocks.key), row_ref[:, keys])
                     for column_ref, row_ref in zip(columns, id_refs[1::2], strict=True)]
            if request.causal and not request.positions:
                queries = places(i * blocks.query, blocks.query, column=True)
                pairs.append((tile_lanes(queries, blocks.key), places(block * blocks.key, blocks.key, column=False)))
            mask = visible(request, positions=pairs[-1] if request.causal else None,
                           segments=pairs[0] if request.segments else None)
            scores_QT = jnp.where(mask, scores_QT, MASKED)
        before = highest_ref[...]
        highest = jnp.maximum(before, jnp.max(scores_QT, axis=1, keepdims=True))
        probs_QT = jnp.exp2(scores_QT - tile_lanes(highest, blocks.key))
        decay = jnp.exp2(before - highest)
        highest_ref[...] = highest
        total_ref[...] = total_ref[...] * decay + jnp.sum(probs_QT, axis=1, keepdims=True)
        sum_ref[...] = sum_ref[...] * tile_lanes(decay, sum_ref.shape[1]) + matmul(
            probs_QT.astype(value_ref.dtype), value_ref[keys, :], contract=(1, 0))

    first, stop = (jnp.clip(seen_ref[2 * query_row + end] - j * per_major, 0, per_major) for end in (0, 1))
    query_range = read_row(query_table_ref, query_row)

    def step(here, _):
        block = j * per_major + here
        key_range = read_row(key_table_ref, key_row + block)
        whole = sees_all(request, query_range, key_range)
        pl.when(whole)(lambda: meet(here, block, masked=False))
        if needs_mask(request):
            pl.when(can_see(request, query_range, key_range) & jnp.logical_not(whole))(
                lambda: meet(here, block, masked=True))

    jax.lax.fori_loop(first, stop, step, None)

    @pl.when(j == majors - 1)
    def _():
        total = total_ref[...]
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        y_ref[...] = (sum_ref[...] / tile_lanes(total, sum_ref.shape[1])).astype(y_ref.dtype)
        lse = jnp.where(seen, highest_ref[...] * (1 / LOG2_E) + jnp.log(total), NOTHING_SEEN)
        lse_ref[...] = lse.T[:1]
