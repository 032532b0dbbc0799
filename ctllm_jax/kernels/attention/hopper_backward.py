"""The backward pass of attention on Hopper, in two kernels that recompute the scores (FlashAttention-2, arXiv
2307.08691).

One kernel holds keys and values, loops over queries, and computes the gradients of keys and values. It uses transposed
scores, so that the probabilities are the left operand, which wgmma reads from registers. The other kernel holds queries
and loops over keys. Without atomics, the results are deterministic. With P the probabilities, dP = dY Vᵀ and dS = P ⊙
(dP - delta): dV = Pᵀ dY, dK = scale · dSᵀ Q, dQ = scale · dS K.

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
    BY_COLUMN,
    BY_ROW,
    LOG2E,
    broadcast_columns,
    broadcast_rows,
    hide_unseen,
    place,
)
from ctllm_jax.kernels.hopper import COMPUTE_REGISTERS, COPY_REGISTERS, ROWS, compiler_params, slot_of, tiled


def attention_backward(query_BSNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array,
                       segment_ids_BS: jax.Array | None, cotangent_BSNH: jax.Array, lse_BNS: jax.Array,
                       delta_BNS: jax.Array, *, causal: bool, sliding_window: int | None, scale: float,
                       blocks: HopperBlocks) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return gradients of query, key and value; `delta` is Σ_H y · cotangent, float32 as `lse` is."""
    batch, length, heads, head_dim = query_BSNH.shape
    kv_heads, dtype = key_BSKH.shape[2], query_BSNH.dtype
    padded = blocks.padded(length)
    query_ids_BP, key_ids_BP = padded_ids(segment_ids_BS, batch=batch, length=length, padded=padded)
    room = ((0, 0), (0, 0), (0, padded - length))
    # Both are subtracted by initializing an accumulator with them: that of Q Kᵀ, before scaling, and that of dY Vᵀ.
    # Queries after the row's end are read as zeros, and so are these values, so they add zero to a gradient.
    lse_BNP, delta_BNP = jnp.pad(-lse_BNS / scale, room), jnp.pad(-delta_BNS, room)
    inputs = (query_BSNH, key_BSKH, value_BSKH, cotangent_BSNH.astype(dtype), lse_BNP, delta_BNP, query_ids_BP,
              key_ids_BP)
    options = dict(group_size=heads // kv_heads, causal=causal, sliding_window=sliding_window, scale=scale,
                   blocks=blocks)
    seen = partial(visible_blocks, key_ids_BP, causal=causal, sliding_window=sliding_window)

    groups, columns, stages = blocks.of("dkv")
    tiles = -(-length // (groups * ROWS))
    bounds = seen(query_block=columns, key_block=groups * ROWS, by_key=True)
    held = plgpu.SMEM((groups, ROWS, head_dim), dtype, transforms=tiled())
    streamed = plgpu.SMEM((stages, columns, head_dim), dtype, transforms=tiled())
    numbers, ids = (plgpu.SMEM((stages, columns), kind) for kind in (jnp.float32, jnp.int32))
    key_grad, value_grad = plgpu.kernel(
        partial(_dkv_kernel, tiles=tiles, kv_heads=kv_heads, **options), kernel_name="attention_dkv",
        grid=(tiles * kv_heads * batch,), grid_names=("tile",), num_threads=groups + 1, thread_name="group",
        out_type=(jax.ShapeDtypeStruct(key_BSKH.shape, dtype), jax.ShapeDtypeStruct(value_BSKH.shape, dtype)),
        scratch_types=dict(
            key=held, value=held, key_ids=plgpu.SMEM((groups, ROWS), jnp.int32),
            query=streamed, cotangent=streamed, lse=numbers, delta=numbers, query_ids=ids,
            held_ready=plgpu.Barrier(num_arrivals=3, num_barriers=groups),  # keys, values, ids
            query_ready=plgpu.Barrier(num_arrivals=3, num_barriers=stages),  # queries, lse, ids
            cotangent_ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),  # and delta
            used=plgpu.Barrier(num_arrivals=groups, num_barriers=stages)),
        compiler_params=compiler_params())(*inputs, bounds)

    groups, columns, stages = blocks.of("dq")
    tiles = -(-length // (groups * ROWS))
    bounds = seen(query_block=groups * ROWS, key_block=columns)
    held = plgpu.SMEM((groups, ROWS, head_dim), dtype, transforms=tiled())
    streamed = plgpu.SMEM((stages, columns, head_dim), dtype, transforms=tiled())
    numbers, ids = (plgpu.SMEM((groups, ROWS), kind) for kind in (jnp.float32, jnp.int32))
    query_grad = plgpu.kernel(
        partial(_dq_kernel, tiles=tiles, heads=heads, **options), kernel_name="attention_dq",
        grid=(tiles * heads * batch,), grid_names=("tile",), num_threads=groups + 1, thread_name="group",
        out_type=jax.ShapeDtypeStruct(query_BSNH.shape, dtype),
        scratch_types=dict(
            query=held, cotangent=held, lse=numbers, delta=numbers, query_ids=ids,
            key=streamed, value=streamed, key_ids=plgpu.SMEM((stages, columns), jnp.int32),
            held_ready=plgpu.Barrier(num_arrivals=5, num_barriers=groups),  # all five of a group's rows
            key_ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),  # keys, and their ids
            value_ready=plgpu.Barrier(num_barriers=stages),
            key_used=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            value_used=plgpu.Barrier(num_arrivals=groups, num_barriers=stages)),
        compiler_params=compiler_params())(*inputs, bounds)
    return query_grad, key_grad, value_grad


def _dkv_kernel(query_ref, key_ref, value_ref, cotangent_ref, lse_ref, delta_ref, query_ids_ref, key_ids_ref,
                bounds_ref, key_grad_ref, value_grad_ref, *, tiles, kv_heads, group_size, causal, sliding_window, scale,
                blocks, key, value, key_ids, query, cotangent, lse, delta, query_ids, held_ready, query_ready,
                cotangent_ready, used):
    groups, columns, stages = blocks.of("dkv")
    head_dim, shape = query_ref.shape[3], (ROWS, columns)
    group = lax.axis_index("group")
    tile, kv_head, row = place(lax.axis_index("tile"), tiles=tiles, heads=kv_heads, last_first=False)
    first, whole_first, whole_end, end = (bounds_ref[row, tile, i] for i in range(4))

    steps = (end - first) * group_size

    def next_block(block):
        """After the last block of queries of one head comes the first one of the next head that uses these keys."""
        return jnp.where(block + 1 == end, first, block + 1)

    @pl.when(group == groups)
    def _copy():
        plgpu.set_max_registers(COPY_REGISTERS[groups], action="decrease")
        for i in range(groups):
            rows = pl.ds((tile * groups + i) * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(key_ref.at[row, rows, kv_head], key.at[i], held_ready.at[i])
            plgpu.copy_gmem_to_smem(value_ref.at[row, rows, kv_head], value.at[i], held_ready.at[i])
            plgpu.copy_gmem_to_smem(key_ids_ref.at[row, rows], key_ids.at[i], held_ready.at[i])

        def step(count, carry):
            head, block = carry
            slot = slot_of(count, stages)
            queries = pl.ds(block * columns, columns)

            @pl.when(count >= stages)
            def _slot_is_free():
                plgpu.barrier_wait(used.at[slot])

            plgpu.copy_gmem_to_smem(query_ref.at[row, queries, head], query.at[slot], query_ready.at[slot])
            plgpu.copy_gmem_to_smem(lse_ref.at[row, head, queries], lse.at[slot], query_ready.at[slot])
            plgpu.copy_gmem_to_smem(query_ids_ref.at[row, queries], query_ids.at[slot], query_ready.at[slot])
            plgpu.copy_gmem_to_smem(cotangent_ref.at[row, queries, head], cotangent.at[slot], cotangent_ready.at[slot])
            plgpu.copy_gmem_to_smem(delta_ref.at[row, head, queries], delta.at[slot], cotangent_ready.at[slot])
            return jnp.where(block + 1 == end, head + 1, head), next_block(block)

        lax.fori_loop(0, steps, step, (kv_head * group_size, first))

    @pl.when(group < groups)
    def _compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS[groups], action="increase")
        row_start = (tile * groups + group) * ROWS
        plgpu.barrier_wait(held_ready.at[group])

        def accumulate(key_grad, value_grad):
            def step(count, block):
                slot = slot_of(count, stages)

                def scores_of(scores):
                    less_RC = broadcast_rows(plgpu.load(lse.at[slot], (), layout=BY_COLUMN), shape)
                    scores[...] = lax.cond(
                        (block >= whole_first) & (block < whole_end), lambda less_RC: less_RC,
                        lambda less_RC: hide_unseen(
                            less_RC, row_start=row_start, column_start=block * columns, row_ids=key_ids.at[group],
                            column_ids=query_ids.at[slot], causal=causal, sliding_window=sliding_window, by_key=True),
                        less_RC)
                    plgpu.wgmma(scores, key.at[group], query.at[slot].transpose((1, 0)))
                    return scores[...]

                plgpu.barrier_wait(query_ready.at[slot])
                scores_RC = pl.run_scoped(scores_of, plgpu.ACC(shape))
                plgpu.barrier_wait(cotangent_ready.at[slot])

                def add(slopes):
                    slopes[...] = broadcast_rows(plgpu.load(delta.at[slot], (), layout=BY_COLUMN), shape)
                    plgpu.wgmma(slopes, value.at[group], cotangent.at[slot].transpose((1, 0)))
                    probs_RC = jnp.exp2(scores_RC * (scale * LOG2E))
                    plgpu.wgmma(value_grad, probs_RC.astype(query.dtype), cotangent.at[slot])
                    slopes_RC = probs_RC * plgpu.wgmma_accumulator_load(slopes, wait_n=1)
                    plgpu.wgmma(key_grad, slopes_RC.astype(query.dtype), query.at[slot])
                    plgpu.wgmma_wait(0)

                pl.run_scoped(add, plgpu.ACC(shape))
                plgpu.barrier_arrive(used.at[slot])
                return next_block(block)

            lax.fori_loop(0, steps, step, first)
            return key_grad[...], value_grad[...]

        key_grad_RH, value_grad_RH = pl.run_scoped(
            accumulate, plgpu.ACC((ROWS, head_dim)), plgpu.ACC((ROWS, head_dim)))
        key.at[group][...] = (key_grad_RH * scale).astype(key.dtype)
        value.at[group][...] = value_grad_RH.astype(value.dtype)
        plgpu.commit_smem()
        # TMA does not write beyond the row's end.
        rows = pl.ds(row_start, ROWS)
        plgpu.copy_smem_to_gmem(key.at[group], key_grad_ref.at[row, rows, kv_head])
        plgpu.copy_smem_to_gmem(value.at[group], value_grad_ref.at[row, rows, kv_head])
        plgpu.wait_smem_to_gmem(0)


def _dq_kernel(query_ref, key_ref, value_ref, cotangent_ref, lse_ref, delta_ref, query_ids_ref, key_ids_ref, bounds_ref,
               query_grad_ref, *, tiles, heads, group_size, causal, sliding_window, scale, blocks, query, cotangent,
               lse, delta, query_ids, key, value, key_ids, held_ready, key_ready, value_ready, key_used, value_used):
    groups, columns, stages = blocks.of("dq")
    head_dim, shape = query_ref.shape[3], (ROWS, columns)
    group = lax.axis_index("group")
    tile, head, row = place(lax.axis_index("tile"), tiles=tiles, heads=heads, last_first=causal)
    first, whole_first, whole_end, end = (bounds_ref[row, tile, i] for i in range(4))

    @pl.when(group == groups)
    def _copy():
        plgpu.set_max_registers(COPY_REGISTERS[groups], action="decrease")
        for i in range(groups):
            rows = pl.ds((tile * groups + i) * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(query_ref.at[row, rows, head], query.at[i], held_ready.at[i])
            plgpu.copy_gmem_to_smem(cotangent_ref.at[row, rows, head], cotangent.at[i], held_ready.at[i])
            plgpu.copy_gmem_to_smem(lse_ref.at[row, head, rows], lse.at[i], held_ready.at[i])
            plgpu.copy_gmem_to_smem(delta_ref.at[row, head, rows], delta.at[i], held_ready.at[i])
            plgpu.copy_gmem_to_smem(query_ids_ref.at[row, rows], query_ids.at[i], held_ready.at[i])
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

    @pl.when(group < groups)
    def _compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS[groups], action="increase")
        row_start = (tile * groups + group) * ROWS
        plgpu.barrier_wait(held_ready.at[group])
        lse_R, delta_R = (plgpu.load(x.at[group], (), layout=BY_ROW) for x in (lse, delta))

        def accumulate(query_grad):
            def step(block, _):
                slot = slot_of(block - first, stages)

                def scores_of(scores):
                    less_RC = broadcast_columns(lse_R, shape)
                    scores[...] = lax.cond(
                        (block >= whole_first) & (block < whole_end), lambda less_RC: less_RC,
                        lambda less_RC: hide_unseen(
                            less_RC, row_start=row_start, column_start=block * columns, row_ids=query_ids.at[group],
                            column_ids=key_ids.at[slot], causal=causal, sliding_window=sliding_window),
                        less_RC)
                    plgpu.wgmma(scores, query.at[group], key.at[slot].transpose((1, 0)))
                    return scores[...]

                plgpu.barrier_wait(key_ready.at[slot])
                scores_RC = pl.run_scoped(scores_of, plgpu.ACC(shape))
                plgpu.barrier_wait(value_ready.at[slot])

                def slopes_of(slopes):
                    slopes[...] = broadcast_columns(delta_R, shape)
                    plgpu.wgmma(slopes, cotangent.at[group], value.at[slot].transpose((1, 0)))
                    probs_RC = jnp.exp2(scores_RC * (scale * LOG2E))
                    return (probs_RC * slopes[...]).astype(query.dtype)

                slopes_RC = pl.run_scoped(slopes_of, plgpu.ACC(shape))
                plgpu.barrier_arrive(value_used.at[slot])
                plgpu.wgmma(query_grad, slopes_RC, key.at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(key_used.at[slot])

            lax.fori_loop(first, end, step, None)
            return query_grad[...]

        query_grad_RH = pl.run_scoped(accumulate, plgpu.ACC((ROWS, head_dim)))
        query.at[group][...] = (query_grad_RH * scale).astype(query.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(query.at[group], query_grad_ref.at[row, pl.ds(row_start, ROWS), head])
        plgpu.wait_smem_to_gmem(0)
