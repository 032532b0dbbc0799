"""The forward pass of attention on Hopper: FlashAttention-3's schedule (arXiv 2407.08608), on packed batches.

A thread block has two or three compute groups of 64 queries each, and one group that copies keys and values some steps
ahead. A compute group issues the matmuls for the scores of this step and the output of the previous one together, and
computes the softmax of this step while the tensor cores still compute the output.

Legend: B batch, S sequence, P the sequence padded to whole blocks, N query heads, K key and value heads, H head dim;
R the 64 rows of a group, C the columns of a step.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ctllm_jax.kernels.attention.hopper_blocks import HopperBlocks, padded_ids, visible_blocks
from ctllm_jax.kernels.attention.hopper_parts import (
    LOG2E,
    broadcast_columns,
    filled,
    hide_unseen,
    place,
)
from ctllm_jax.kernels.hopper import COMPUTE_REGISTERS, COPY_REGISTERS, ROWS, compiler_params, slot_of, tiled

LOWEST = -1e30
"""Initial value of a row's maximum. It is finite, so that a fully masked row never subtracts two infinities."""


def attention_forward(query_BSNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array,
                      segment_ids_BS: jax.Array | None, *, causal: bool, sliding_window: int | None, scale: float,
                      blocks: HopperBlocks, nothing_seen: float) -> tuple[jax.Array, jax.Array]:
    """Return (y_BSNH, lse_BNS): `lse` in float32, natural logarithm, `nothing_seen` for a query without visible
    keys."""
    batch, length, heads, head_dim = query_BSNH.shape
    groups, columns, stages = blocks.of("forward")
    padded = blocks.padded(length)
    query_ids_BP, key_ids_BP = padded_ids(segment_ids_BS, batch=batch, length=length, padded=padded)
    bounds = visible_blocks(key_ids_BP, query_block=groups * ROWS, key_block=columns, causal=causal,
                            sliding_window=sliding_window)
    tiles = -(-length // (groups * ROWS))
    kernel = partial(_kernel, tiles=tiles, heads=heads, group_size=heads // key_BSKH.shape[2], causal=causal,
                     sliding_window=sliding_window, scale=scale, blocks=blocks, nothing_seen=nothing_seen)
    dtype = query_BSNH.dtype
    y_BSNH, lse_BNP = plgpu.kernel(
        kernel, kernel_name="attention_forward", grid=(tiles * heads * batch,), grid_names=("tile",),
        num_threads=groups + 1, thread_name="group",
        out_type=(jax.ShapeDtypeStruct(query_BSNH.shape, dtype),
                  jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32)),
        scratch_types=dict(
            query=plgpu.SMEM((groups, ROWS, head_dim), dtype, transforms=tiled()),
            key=plgpu.SMEM((stages, columns, head_dim), dtype, transforms=tiled()),
            value=plgpu.SMEM((stages, columns, head_dim), dtype, transforms=tiled()),
            key_ids=plgpu.SMEM((stages, columns), jnp.int32),
            query_ids=plgpu.SMEM((groups, ROWS), jnp.int32),
            lse=plgpu.SMEM((groups, ROWS), jnp.float32),
            query_ready=plgpu.Barrier(num_arrivals=2, num_barriers=groups),  # queries, and their ids
            key_ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            value_ready=plgpu.Barrier(num_barriers=stages),
            key_used=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            value_used=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            turn=plgpu.Barrier(num_barriers=groups)),
        compiler_params=compiler_params(),
    )(query_BSNH, key_BSKH, value_BSKH, query_ids_BP, key_ids_BP, bounds)
    return y_BSNH, lse_BNP[:, :, :length]


def _kernel(query_ref, key_ref, value_ref, query_ids_ref, key_ids_ref, bounds_ref, y_ref, lse_ref, *, tiles, heads,
            group_size, causal, sliding_window, scale, blocks, nothing_seen, query, key, value, query_ids, key_ids,
            lse, query_ready, key_ready, value_ready, key_used, value_used, turn):
    groups, columns, stages = blocks.of("forward")
    head_dim = query_ref.shape[3]
    group = lax.axis_index("group")
    # The blocks of one head are consecutive, so that its keys stay in the L2 cache; the longest block comes first.
    tile, head, row = place(lax.axis_index("tile"), tiles=tiles, heads=heads, last_first=causal)
    first, whole_first, whole_end, end = (bounds_ref[row, tile, i] for i in range(4))

    @pl.when(group == groups)
    def _copy():
        plgpu.set_max_registers(COPY_REGISTERS[groups], action="decrease")
        for i in range(groups):
            rows = pl.ds((tile * groups + i) * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(query_ref.at[row, rows, head], query.at[i], query_ready.at[i])
            plgpu.copy_gmem_to_smem(query_ids_ref.at[row, rows], query_ids.at[i], query_ready.at[i])
        kv_head = lax.div(head, jnp.int32(group_size))

        def step(block, _):
            count = block - first
            slot = slot_of(count, stages)
            keys = pl.ds(block * columns, columns)

            @pl.when(count >= stages)
            def _key_slot_is_free():
                plgpu.barrier_wait(key_used.at[slot])

            plgpu.copy_gmem_to_smem(key_ref.at[row, keys, kv_head], key.at[slot], key_ready.at[slot])
            plgpu.copy_gmem_to_smem(key_ids_ref.at[row, keys], key_ids.at[slot], key_ready.at[slot])

            @pl.when(count >= stages)
            def _value_slot_is_free():
                plgpu.barrier_wait(value_used.at[slot])

            plgpu.copy_gmem_to_smem(value_ref.at[row, keys, kv_head], value.at[slot], value_ready.at[slot])

        lax.fori_loop(first, end, step, None)

    def wait_for_turn():
        if blocks.alternate:
            plgpu.barrier_wait(turn.at[group])

    def give_turn():
        if blocks.alternate:
            plgpu.barrier_arrive(turn.at[lax.rem(group + 1, jnp.int32(groups))])

    @pl.when(group < groups)
    def _compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS[groups], action="increase")
        row_start = (tile * groups + group) * ROWS

        def hide(scores_RC, block, slot):
            return hide_unseen(scores_RC, row_start=row_start, column_start=block * columns,
                               row_ids=query_ids.at[group], column_ids=key_ids.at[slot], causal=causal,
                               sliding_window=sliding_window)

        def softmax(scores_RC, highest_R, sums_R):
            """exp2 of the scores, with the scale folded into the exponent; `highest` is of scaled scores."""
            new_highest_R = jnp.maximum(highest_R, jnp.max(scores_RC, axis=1) * (scale * LOG2E))
            decay_R = jnp.exp2(highest_R - new_highest_R)
            probs_RC = jnp.exp2(scores_RC * (scale * LOG2E) - broadcast_columns(new_highest_R, scores_RC.shape))
            sums_R = sums_R * decay_R + jnp.sum(probs_RC, axis=1)
            return new_highest_R, sums_R, decay_R, probs_RC.astype(query.dtype)

        def over_keys(output):
            @pl.when(group == groups - 1)
            def _group_0_begins():
                give_turn()

            plgpu.barrier_wait(query_ready.at[group])
            plgpu.barrier_wait(key_ready.at[0])

            def first_scores(scores):
                wait_for_turn()
                plgpu.wgmma(scores, query.at[group], key.at[0].transpose((1, 0)))
                give_turn()
                return scores[...]

            scores_RC = pl.run_scoped(first_scores, plgpu.ACC((ROWS, columns)))
            scores_RC = hide(scores_RC, first, 0)
            plgpu.barrier_arrive(key_used.at[0])
            highest_R, sums_R, _, probs_RC = softmax(scores_RC, filled(LOWEST, (ROWS,)), filled(0.0, (ROWS,)))

            def step(block, carry):
                highest_R, sums_R, probs_RC = carry
                count = block - first
                slot, last_slot = (slot_of(i, stages) for i in (count, count - 1))
                plgpu.barrier_wait(key_ready.at[slot])

                def issue(scores):
                    wait_for_turn()
                    plgpu.wgmma(scores, query.at[group], key.at[slot].transpose((1, 0)))
                    plgpu.barrier_wait(value_ready.at[last_slot])
                    plgpu.wgmma(output, probs_RC, value.at[last_slot])
                    give_turn()
                    return plgpu.wgmma_accumulator_load(scores, wait_n=1)  # the output matmul continues

                scores_RC = pl.run_scoped(issue, plgpu.ACC((ROWS, columns)))
                scores_RC = lax.cond((block >= whole_first) & (block < whole_end), lambda scores_RC: scores_RC,
                                     lambda scores_RC: hide(scores_RC, block, slot), scores_RC)
                plgpu.barrier_arrive(key_used.at[slot])
                highest_R, sums_R, decay_R, probs_RC = softmax(scores_RC, highest_R, sums_R)
                output_RH = output[...]
                plgpu.barrier_arrive(value_used.at[last_slot])
                output[...] = output_RH * broadcast_columns(decay_R, output_RH.shape)
                return highest_R, sums_R, probs_RC

            highest_R, sums_R, probs_RC = lax.fori_loop(first + 1, end, step, (highest_R, sums_R, probs_RC))
            slot = slot_of(end - 1 - first, stages)
            plgpu.barrier_wait(value_ready.at[slot])
            plgpu.wgmma(output, probs_RC, value.at[slot])
            return output[...], highest_R, sums_R

        output_RH, highest_R, sums_R = pl.run_scoped(over_keys, plgpu.ACC((ROWS, head_dim)))
        shares_R = jnp.where(sums_R > 0, 1 / sums_R, 0)
        query.at[group][...] = (output_RH * broadcast_columns(shares_R, output_RH.shape)).astype(query.dtype)
        lse.at[group][...] = jnp.where(sums_R > 0, (highest_R + jnp.log2(sums_R)) * (1 / LOG2E), nothing_seen)
        plgpu.commit_smem()
        # TMA does not write beyond the row's end.
        rows = pl.ds(row_start, ROWS)
        plgpu.copy_smem_to_gmem(query.at[group], y_ref.at[row, rows, head])
        plgpu.copy_smem_to_gmem(lse.at[group], lse_ref.at[row, head, rows])
        plgpu.wait_smem_to_gmem(0)
