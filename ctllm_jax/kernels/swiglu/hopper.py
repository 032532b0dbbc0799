"""SwiGLU for Hopper GPUs, in Pallas Mosaic GPU: both products and the activation in one kernel.

There is one thread block per multiprocessor, and each processes many tiles of the output, so that the next tile is
loaded while this one is finished. A block has two or three compute groups of 64 tokens each, with two accumulators, and
one producer group. In the backward pass the same kernel recomputes both products, or reads them if the forward pass
saved them, and returns their gradients; XLA computes the remaining four matmuls.

Legend: T tokens, D hidden, F FFN; R the 64 rows of a group, C the columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ctllm_jax.kernels.hopper import (
    COMPUTE_REGISTERS,
    COPY_REGISTERS,
    ROWS,
    check_multiple,
    check_registers,
    check_shared_bytes,
    compiler_params,
    is_hopper,
    slot_of,
    tiled,
)

DEPTH = 64
"""Depth of a step: the number of elements in a swizzled row of 128 bytes."""
CHUNK = 64
"""Columns that are written at a time, for the same reason."""


@dataclass(frozen=True)
class SwigluBlocks:
    """Sizes of a tile.

    Attributes:
      groups: number of compute groups, of 64 tokens each.
      columns: columns of gate and of up.
      stages, backward_stages: number of loads of 64 of D in flight, if one array is written, and if more are.
      band: number of token tiles that are processed before the next ones, so that they stay in the L2 cache.
    """

    groups: int = 2
    columns: int = 128
    stages: int = 4
    backward_stages: int = 3
    band: int = 16

    def check(self) -> None:
        """Raise ValueError that names the limit that these sizes exceed."""
        if self.groups not in COMPUTE_REGISTERS:
            raise ValueError(f"groups is {self.groups}, and must be one of {', '.join(map(str, COMPUTE_REGISTERS))}")
        check_multiple("columns", self.columns, CHUNK)
        check_multiple("band", self.band, 1)
        if self.columns > 256:
            raise ValueError(f"a tile is {self.columns} wide, and a matrix instruction 256 at most")
        check_registers("a tile", self.columns, groups=self.groups)
        for mode in MODES:
            stages = self.of(mode)
            if stages < 2:
                raise ValueError(f"stages are {stages}, and must be at least 2: one is computed, one is loaded")
            check_shared_bytes(f"a tile ({mode})", self.shared_bytes(mode))

    def of(self, mode: str) -> int:
        """Stages of a mode."""
        return self.stages if MODES[mode] == 1 else self.backward_stages

    def shared_bytes(self, mode: str) -> int:
        """Bytes of a block's tiles, in a mode."""
        rows = self.groups * ROWS
        streamed = self.of(mode) * (rows + 2 * self.columns) * DEPTH * 2
        written = buffers(mode) * MODES[mode] * rows * CHUNK * 2
        return streamed + written + (rows * self.columns * 2 if mode == "gradients" else 0)


MODES = {"product": 1, "products": 3, "gradients": 2}
"""Output mode of the kernel -> number of arrays: silu(gate) ⊙ up; that, gate and up; of a cotangent, their
gradients."""


def buffers(mode: str) -> int:
    """Output buffers per array: a single output has two, one of which is filled while the other is read."""
    return 2 if MODES[mode] == 1 else 1


DEFAULT_BLOCKS = SwigluBlocks()


def refusal(device_kind: str, *, dtype: str, hidden: int, ffn: int) -> str | None:
    """Return why this kernel does not support the arguments, or None if it does. Any number of tokens is supported."""
    if not is_hopper(device_kind):
        return f"its GPU kernel is for Hopper (H100, H200), and this is {device_kind}"
    if dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 and float16, and x is {dtype}"
    if hidden % DEPTH or ffn % CHUNK:
        return f"the memory engine reads tiles of 64 columns, and D={hidden} and F={ffn} are not both multiples of 64"
    return None


def swiglu_hopper(x: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, *, recompute: bool = True,
                  multiprocessors: int = 132, blocks: SwigluBlocks = DEFAULT_BLOCKS) -> jax.Array:
    """As `kernels.swiglu`.

    Args:
      recompute: save x and the weights for the backward pass, and recompute both products there. False saves the
        products.
      multiprocessors: their number on the device, `jax.Device.core_count`.

    Raises:
      ValueError: the blocks do not fit a multiprocessor.
    """
    blocks.check()
    x_TD = x.reshape(-1, x.shape[-1])
    room = -x_TD.shape[0] % 8
    if room:  # TMA reads tiles of 8 rows.
        x_TD = jnp.pad(x_TD, ((0, room), (0, 0)))
    h_TF = _swiglu(_Plan(recompute, multiprocessors, blocks), x_TD, gate_DF, up_DF)
    return h_TF[:h_TF.shape[0] - room].reshape(*x.shape[:-1], gate_DF.shape[1])


class _Plan(NamedTuple):
    """The static arguments of a call; hashable, as custom_vjp requires."""

    recompute: bool
    multiprocessors: int
    blocks: SwigluBlocks

    def call(self, mode: str, *inputs: jax.Array) -> list[jax.Array]:
        return swiglu_arrays(mode, *inputs, blocks=self.blocks, multiprocessors=self.multiprocessors)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(plan, x_TD, gate_DF, up_DF):
    return plan.call("product", x_TD, gate_DF, up_DF)[0]


def _forward(plan, x_TD, gate_DF, up_DF):
    if plan.recompute:
        return _swiglu(plan, x_TD, gate_DF, up_DF), (x_TD, gate_DF, up_DF)
    h_TF, *products = plan.call("products", x_TD, gate_DF, up_DF)
    return h_TF, (x_TD, gate_DF, up_DF, *products)


def _backward(plan, residuals, cotangent_TF):
    x_TD, gate_DF, up_DF, *products = residuals
    if products:
        grads = activation_gradients(*(x.astype(jnp.float32) for x in (*products, cotangent_TF)))
        dgate_TF, dup_TF = (grad.astype(x_TD.dtype) for grad in grads)
    else:
        dgate_TF, dup_TF = plan.call("gradients", x_TD, gate_DF, up_DF, cotangent_TF.astype(x_TD.dtype))
    dot = partial(lax.dot_general, preferred_element_type=jnp.float32)
    over_columns, over_tokens = (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))
    x_grad = dot(dgate_TF, gate_DF, over_columns) + dot(dup_TF, up_DF, over_columns)
    return (x_grad.astype(x_TD.dtype), dot(x_TD, dgate_TF, over_tokens).astype(gate_DF.dtype),
            dot(x_TD, dup_TF, over_tokens).astype(up_DF.dtype))


_swiglu.defvjp(_forward, _backward)


def activation_gradients(gate, up, cotangent):
    """Return gradients of gate and up for a cotangent of silu(gate) ⊙ up; all float32."""
    share = 1 / (1 + jnp.exp(-gate))
    silu = gate * share
    # silu' = σ + silu · (1 - σ)
    return cotangent * up * (share + silu * (1 - share)), cotangent * silu


def swiglu_arrays(mode: str, x_TD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, *wide_TF: jax.Array,
                  blocks: SwigluBlocks, multiprocessors: int) -> list[jax.Array]:
    """Return the arrays of a mode of `MODES`, each [T, F]; "gradients" also takes the cotangent. T % 8 == D % 64 == F %
    64 == 0"""
    tokens, hidden, ffn, dtype = *x_TD.shape, gate_DF.shape[1], x_TD.dtype
    rows, columns, stages = blocks.groups * ROWS, blocks.columns, blocks.of(mode)
    row_tiles, column_tiles = -(-tokens // rows), -(-ffn // columns)
    weights = plgpu.SMEM((stages, DEPTH, columns), dtype, transforms=tiled())
    written = plgpu.SMEM((buffers(mode), blocks.groups, ROWS, CHUNK), dtype, transforms=tiled())
    scratch: dict[str, pl.MemoryRef | plgpu.Barrier | list[pl.MemoryRef]] = dict(
        x=plgpu.SMEM((stages, rows, DEPTH), dtype, transforms=tiled()), gate=weights, up=weights,
        written=[written] * MODES[mode],
        ready=plgpu.Barrier(num_arrivals=3, num_barriers=stages),  # x, gate, up
        used=plgpu.Barrier(num_arrivals=blocks.groups, num_barriers=stages))
    if mode == "gradients":
        scratch |= dict(
            cotangent=plgpu.SMEM((blocks.groups, ROWS, columns), dtype, transforms=tiled()),
            cotangent_ready=plgpu.Barrier(num_barriers=blocks.groups),
            cotangent_used=plgpu.Barrier(num_barriers=blocks.groups))
    return plgpu.kernel(
        partial(_kernel, mode=mode, row_tiles=row_tiles, column_tiles=column_tiles, steps=hidden // DEPTH,
                blocks=blocks, processors=min(multiprocessors, row_tiles * column_tiles)),
        kernel_name=f"swiglu_{mode}", grid=(min(multiprocessors, row_tiles * column_tiles),), grid_names=("processor",),
        num_threads=blocks.groups + 1, thread_name="group",
        out_type=[jax.ShapeDtypeStruct((tokens, ffn), dtype)] * MODES[mode], scratch_types=scratch,
        compiler_params=compiler_params())(x_TD, gate_DF, up_DF, *wide_TF)


def _kernel(x_ref, gate_ref, up_ref, *refs, mode, row_tiles, column_tiles, steps, blocks, processors, x, gate, up,
            written, ready, used, cotangent=None, cotangent_ready=None, cotangent_used=None):
    groups, columns, stages = blocks.groups, blocks.columns, blocks.of(mode)
    rows = groups * ROWS
    cotangent_ref, out_refs = (refs[0], refs[1:]) if mode == "gradients" else (None, refs)
    group, processor = lax.axis_index("group"), lax.axis_index("processor")
    # Processor i computes the tiles i, i + processors, i + 2 · processors, …
    own_tiles = lax.div(row_tiles * column_tiles - 1 - processor, jnp.int32(processors)) + 1

    def place(number):
        """(first row, first column) of this processor's tile: down a band of rows, then the next columns."""
        tile, in_band = processor + number * processors, blocks.band * column_tiles
        band = lax.div(tile, jnp.int32(in_band))
        height = jnp.minimum(blocks.band, row_tiles - band * blocks.band)
        within = tile - band * in_band
        return (band * blocks.band + lax.rem(within, height)) * rows, lax.div(within, height) * columns

    @pl.when(group == groups)
    def _copy():
        plgpu.set_max_registers(COPY_REGISTERS[groups], action="decrease")

        def over_tiles(number, _):
            row, column = place(number)
            if cotangent_ref is not None:
                for i in range(groups):
                    @pl.when(number > 0)
                    def _cotangent_is_free(i=i):
                        plgpu.barrier_wait(cotangent_used.at[i])

                    plgpu.copy_gmem_to_smem(
                        cotangent_ref.at[pl.ds(row + i * ROWS, ROWS), pl.ds(column, columns)], cotangent.at[i],
                        cotangent_ready.at[i])

            def step(k, _):
                count = number * steps + k
                slot = slot_of(count, stages)

                @pl.when(count >= stages)
                def _slot_is_free():
                    plgpu.barrier_wait(used.at[slot])

                depth = pl.ds(k * DEPTH, DEPTH)
                plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(row, rows), depth], x.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(gate_ref.at[depth, pl.ds(column, columns)], gate.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(up_ref.at[depth, pl.ds(column, columns)], up.at[slot], ready.at[slot])

            lax.fori_loop(0, steps, step, None)

        lax.fori_loop(0, own_tiles, over_tiles, None)

    @pl.when(group < groups)
    def _compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS[groups], action="increase")

        def over_tiles(number, _):
            def products(gate_sum, up_sum):
                def step(k, _):
                    count = number * steps + k
                    slot = slot_of(count, stages)
                    plgpu.barrier_wait(ready.at[slot])
                    tokens = x.at[slot, pl.ds(group * ROWS, ROWS)]
                    plgpu.wgmma(gate_sum, tokens, gate.at[slot])
                    plgpu.wgmma(up_sum, tokens, up.at[slot])
                    plgpu.wgmma_wait(2)  # This step's two matmuls continue; the previous step's are done.

                    @pl.when(k > 0)
                    def _give_back():
                        plgpu.barrier_arrive(used.at[slot_of(count - 1, stages)])

                lax.fori_loop(0, steps, step, None)
                sums = gate_sum[...], up_sum[...]
                plgpu.barrier_arrive(used.at[slot_of((number + 1) * steps - 1, stages)])
                return sums

            gate_RC, up_RC = pl.run_scoped(products, plgpu.ACC((ROWS, columns)), plgpu.ACC((ROWS, columns)))
            if mode == "gradients":
                plgpu.barrier_wait(cotangent_ready.at[group])
                cotangent_RC = plgpu.load(cotangent.at[group], (), layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                plgpu.barrier_arrive(cotangent_used.at[group])
                results = activation_gradients(gate_RC, up_RC, cotangent_RC)
            else:
                results = (gate_RC / (1 + jnp.exp(-gate_RC)) * up_RC, gate_RC, up_RC)[:MODES[mode]]
            row, column = place(number)
            for i in range(columns // CHUNK):
                part = slot_of(number * (columns // CHUNK) + i, buffers(mode))
                plgpu.wait_smem_to_gmem(buffers(mode) - 1, wait_read_only=True)
                for result_RC, buffer in zip(results, written, strict=True):
                    buffer.at[part, group][...] = result_RC[:, i * CHUNK:(i + 1) * CHUNK].astype(x.dtype)
                plgpu.commit_smem()
                for buffer, out_ref in zip(written, out_refs, strict=True):
                    # TMA does not write outside the array.
                    plgpu.copy_smem_to_gmem(buffer.at[part, group], out_ref.at[
                        pl.ds(row + group * ROWS, ROWS), pl.ds(column + i * CHUNK, CHUNK)])

        lax.fori_loop(0, own_tiles, over_tiles, None)
        plgpu.wait_smem_to_gmem(0)
