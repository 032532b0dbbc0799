"""The fused backward pass on TPU: the probabilities of a pair of blocks are computed once for all three gradients.

The gradients of the held keys and values are accumulated in VMEM over all blocks of queries. A row longer than
`key_major` runs through the kernel once per part of its keys, and the queries' gradient is accumulated in float32 over
these runs.

Legend: B rows, N query heads, K kv heads, G query heads of one kv head, S sequence, H head dim, Q queries of a block,
T keys of a block, M keys held at once.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ctllm_jax.kernels.attention.fused import Request
from ctllm_jax.kernels.attention.tpu_blocks import Blocks
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


def backward_kernel(request: Request, blocks: Blocks, ranges: Ranges, part, query_BNSH, key_BKMH, value_BKMH,
                    cotangent_BNSH, lse_BN1S, delta_BN1S, ids, query_grad_BNSH, *, vmem_limit: int,
                    cost: pl.CostEstimate, interpret):
    """Gradients (query_BNSH, key_BKMH, value_BKMH) of one part of the keys.

    Args:
      part: int32 scalar, the index of the part of `key_major` keys.
      ids: as for `forward_kernel`; those of keys [B, 1, M].
      query_grad_BNSH: float32, the sum over earlier parts, to which this part is added; None: there is only one part,
        and the gradient has the query's dtype.
    """
    batch, heads, length, head_dim = query_BNSH.shape
    kv_heads, held = key_BKMH.shape[1:3]
    group = heads // kv_heads
    block = blocks.backward_query
    query_blocks = length // block
    if query_grad_BNSH is None:
        # Each block's gradient is written only here.
        spans = jnp.tile(jnp.array([0, query_blocks - 1], jnp.int32), ranges.rows)
    else:
        spans = _queries_of_part(ranges, part, query_blocks=query_blocks, per_major=held // blocks.backward_key)

    def near(b, i, spans_ref):
        """The block of queries to hold: the nearest that attends to these keys, so that none is copied
        unnecessarily."""
        row = 2 * (b if ranges.rows > 1 else 0)
        return jnp.clip(i, spans_ref[row], spans_ref[row + 1])

    def query_place(b, k, g, i, spans_ref, *tables):
        return b, k * group + g, near(b, i, spans_ref), 0

    def number_place(b, k, g, i, spans_ref, *tables):
        return b, k * group + g, 0, near(b, i, spans_ref)

    query_spec = pl.BlockSpec((None, None, block, head_dim), query_place)
    key_spec = pl.BlockSpec((None, None, held, head_dim), lambda b, k, g, i, *tables: (b, k, 0, 0))
    number_spec = pl.BlockSpec((None, None, 1, block), number_place)
    query_ids = pl.BlockSpec((None, 1, block), lambda b, k, g, i, spans_ref, *tables: (b, 0, near(b, i, spans_ref)))
    key_ids = pl.BlockSpec((None, 1, held), lambda b, k, g, i, *tables: (b, 0, 0))
    tables = (spans, jnp.reshape(part, (1,)), ranges.seen, ranges.query, ranges.key)
    inputs = [query_BNSH, key_BKMH, value_BKMH, cotangent_BNSH, lse_BN1S, delta_BN1S,
              *(x for pair in ids for x in pair)]
    specs = [query_spec, key_spec, key_spec, query_spec, number_spec, number_spec, *[query_ids, key_ids] * len(ids)]
    grad_dtype, aliases = query_BNSH.dtype, {}
    if query_grad_BNSH is not None:
        grad_dtype, aliases = jnp.float32, {len(tables) + len(inputs): 0}
        inputs.append(query_grad_BNSH)
        specs.append(query_spec)
    return pl.pallas_call(
        partial(_kernel, request, blocks, ranges.rows > 1, len(ids), query_grad_BNSH is not None),
        name="attention_backward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables), grid=(batch, kv_heads, group, query_blocks), in_specs=specs,
            out_specs=[query_spec, key_spec, key_spec],
            scratch_shapes=[pltpu.VMEM((head_dim, block), jnp.float32)]
            + [pltpu.VMEM((held, head_dim), jnp.float32)] * 2),
        out_shape=[jax.ShapeDtypeStruct(query_BNSH.shape, grad_dtype),
                   *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key_BKMH, value_BKMH))],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
                                             vmem_limit_bytes=vmem_limit),
        cost_estimate=cost, interpret=interpret,
    )(*tables, *inputs)


def _queries_of_part(ranges: Ranges, part, *, query_blocks: int, per_major: int):
    """The first and last block of queries that attend to keys of this part, flat [B 2]; 0, 0 if there is none."""
    first_BI, stop_BI = jnp.moveaxis(ranges.seen.reshape(ranges.rows, query_blocks, 2), 2, 0)
    meets_BI = (first_BI < (part + 1) * per_major) & (stop_BI > part * per_major)
    first_B = jnp.argmax(meets_BI, axis=1)
    last_B = query_blocks - 1 - jnp.argmax(meets_BI[:, ::-1], axis=1)
    last_B = jnp.where(jnp.any(meets_BI, axis=1), last_B, 0)
    return jnp.stack([first_B, last_B], axis=1).astype(jnp.int32).reshape(-1)


def _kernel(request, blocks, many_rows, num_ids, accumulates, spans_ref, part_ref, seen_ref, query_table_ref,
            key_table_ref, query_ref, key_ref, value_ref, cotangent_ref, lse_ref, delta_ref, *refs):
    id_refs, refs = refs[:2 * num_ids], refs[2 * num_ids:]
    so_far_ref, refs = (refs[0], refs[1:]) if accumulates else (None, refs)
    query_grad_ref, key_grad_ref, value_grad_ref, query_sum_ref, key_sum_ref, value_sum_ref = refs
    b, g, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    query_blocks = pl.num_programs(3)
    per_major = blocks.backward_key_major // blocks.backward_key
    first_block = part_ref[0] * per_major
    row = b if many_rows else 0
    query_row = row * query_blocks + i
    key_row = row * (query_blocks * blocks.backward_query // blocks.backward_key)

    @pl.when((g == 0) & (i == 0))
    def _():
        key_sum_ref[...] = jnp.zeros_like(key_sum_ref)
        value_sum_ref[...] = jnp.zeros_like(value_sum_ref)

    def meet(here, block, masked: bool):
        """Process one block of keys: index `here` in VMEM, `block` in its row. Scores have the shape [T, Q]:
        log-sum-exps then lie along lanes, as in memory, and only one of five matmuls reads a transposed operand instead
        of two."""
        keys = pl.ds(pl.multiple_of(here * blocks.backward_key, blocks.backward_key), blocks.backward_key)
        query_QH, cotangent_QH = query_ref[...], cotangent_ref[...]
        key_TH, value_TH = key_ref[keys, :], value_ref[keys, :]
        scores_TQ = matmul(key_TH, query_QH, contract=(1, 1)) * (request.scale * LOG2_E)
        if masked:
            pairs = [(query_row_ref[...], tile_lanes(to_column(key_row_ref[:, keys]), blocks.backward_query))
                     for query_row_ref, key_row_ref in zip(id_refs[::2], id_refs[1::2], strict=True)]
            if request.causal and not request.positions:
                column = places(block * blocks.backward_key, blocks.backward_key, column=True)
                pairs.append((places(i * blocks.backward_query, blocks.backward_query, column=False),
                              tile_lanes(column, blocks.backward_query)))
            mask = visible(request, positions=pairs[-1] if request.causal else None,
                           segments=pairs[0] if request.segments else None)
            scores_TQ = jnp.where(mask, scores_TQ, MASKED)
        probs_TQ = jnp.exp2(scores_TQ - lse_ref[...] * LOG2_E)
        value_sum_ref[keys, :] += matmul(probs_TQ.astype(query_QH.dtype), cotangent_QH, contract=(1, 0))
        slopes_TQ = matmul(value_TH, cotangent_QH, contract=(1, 1)) - delta_ref[...]
        slopes_TQ = (probs_TQ * slopes_TQ).astype(query_QH.dtype)
        key_sum_ref[keys, :] += matmul(slopes_TQ, query_QH, contract=(1, 0))
        query_sum_ref[...] += matmul(key_TH, slopes_TQ, contract=(0, 0))

    # Other grid steps hold a block that is computed at its own step.
    @pl.when(i == jnp.clip(i, spans_ref[2 * row], spans_ref[2 * row + 1]))
    def _():
        query_sum_ref[...] = jnp.zeros_like(query_sum_ref)
        first, stop = (jnp.clip(seen_ref[2 * query_row + end] - first_block, 0, per_major) for end in (0, 1))
        query_range = read_row(query_table_ref, query_row)

        def step(here, _):
            block = first_block + here
            key_range = read_row(key_table_ref, key_row + block)
            whole = sees_all(request, query_range, key_range)
            pl.when(whole)(lambda: meet(here, block, masked=False))
            if needs_mask(request):
                pl.when(can_see(request, query_range, key_range) & jnp.logical_not(whole))(
                    lambda: meet(here, block, masked=True))

        jax.lax.fori_loop(first, stop, step, None)
        query_grad = query_sum_ref[...].T * request.scale
        if accumulates:
            query_grad += so_far_ref[...]
        query_grad_ref[...] = query_grad.astype(query_grad_ref.dtype)

    @pl.when((g == pl.num_programs(2) - 1) & (i == query_blocks - 1))
    def _():
        key_grad_ref[...] = (key_sum_ref[...] * request.scale).astype(key_grad_ref.dtype)
        value_grad_ref[...] = value_sum_ref[...].astype(value_grad_ref.dtype)
