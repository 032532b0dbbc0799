"""SwiGLU for TPU (Pallas, Mosaic TPU): both projections and the activation in one kernel, and its backward pass.

The two products never leave VMEM. The forward kernel writes only h. The backward kernel recomputes the products and
converts h's cotangent to theirs; XLA computes the four remaining matmuls, and uses the MXU as well as our kernel would.
FLOPs for T × D × F: forward 4·TDF; backward 4·TDF again, and 8·TDF for dx, dgate and dup. A kernel that also
accumulates dx would save one read of the two cotangents, 4·TF bytes, at D FLOPs per byte (the chips need 170 to 560); a
kernel for the weights would have to compute the products a third time.

Legend: T tokens, D hidden, F FFN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ctllm_jax.kernels.swiglu.blocks import LANES, Blocks, Chip, choose_blocks
from ctllm_jax.kernels.swiglu.xla import activation_gradient

DTYPES = ("bfloat16", "float32")


class Plan(NamedTuple):
    """The static arguments of the kernels."""

    blocks: Blocks
    vmem_bytes: int
    recompute: bool


def swiglu_tpu(x: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, *, chip: Chip, blocks: Blocks | None = None,
               recompute: bool = True) -> jax.Array:
    """As `kernels.swiglu`.

    Args:
      x: [..., D], bfloat16 or float32.
      gate_DF, up_DF: [D, F], x's dtype.
      chip: the chip that it is compiled for, from `blocks.CHIPS`.
      blocks: block sizes; None: the chip's.
      recompute: save x and the weights for the backward pass, and recompute the products there. False saves both
        products, [..., F] in x's dtype each: use it inside a `jax.checkpoint`, which recomputes them anyway.

    Raises:
      ValueError: the blocks exceed a limit of the chip.
    """
    x_TD = x.reshape(-1, x.shape[-1])
    (tokens, hidden), ffn = x_TD.shape, gate_DF.shape[1]
    if 0 in (tokens, hidden, ffn):
        return jnp.zeros((*x.shape[:-1], ffn), x.dtype)
    blocks = choose_blocks(chip, tokens=tokens, hidden=hidden, ffn=ffn, itemsize=x.dtype.itemsize, blocks=blocks)
    plan = Plan(blocks, chip.vmem_bytes, recompute)
    return _swiglu(x_TD, gate_DF, up_DF, plan).reshape(*x.shape[:-1], ffn)


def products_gradient(x_TD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, dh_TF: jax.Array, *,
                      plan: Plan) -> tuple[jax.Array, ...]:
    """Compute the cotangents of x · gate and x · up, [T, F] each in x's dtype, from that of h: the backward kernel."""
    return _call(activation_gradient, x_TD, gate_DF, up_DF, dh_TF, plan=plan, outputs=2, name="swiglu_backward")


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _swiglu(x_TD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, plan: Plan) -> jax.Array:
    return _call(_activate, x_TD, gate_DF, up_DF, plan=plan, outputs=1, name="swiglu_forward")[0]


def _forward(x_TD, gate_DF, up_DF, plan):
    if plan.recompute:
        return _swiglu(x_TD, gate_DF, up_DF, plan), (x_TD, gate_DF, up_DF, None)
    h_TF, *products = _call(_activate_and_keep, x_TD, gate_DF, up_DF, plan=plan, outputs=3, name="swiglu_forward_keep")
    return h_TF, (x_TD, gate_DF, up_DF, products)


def _backward(plan, residuals, dh_TF):
    x_TD, gate_DF, up_DF, products = residuals
    if products is None:
        dgate_TF, dup_TF = products_gradient(x_TD, gate_DF, up_DF, dh_TF, plan=plan)
    else:
        dgate_TF, dup_TF = activation_gradient(*products, dh_TF)
    dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    last, first = (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))
    dx_TD = dot(dgate_TF, gate_DF, last) + dot(dup_TF, up_DF, last)
    return tuple(slope.astype(x_TD.dtype) for slope in (dx_TD, dot(x_TD, dgate_TF, first), dot(x_TD, dup_TF, first)))


_swiglu.defvjp(_forward, _backward)


# Processing of the two products, float32: (gate, up, *blocks of wide inputs) -> the blocks of the outputs.

def _activate(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, ...]:
    return (gate * jax.nn.sigmoid(gate) * up,)


def _activate_and_keep(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, ...]:
    return *_activate(gate, up), gate, up


def _call(finish: Callable, *inputs: jax.Array, plan: Plan, outputs: int, name: str) -> tuple[jax.Array, ...]:
    """`_launch` with a `vmap` rule: the rows of all x run through one kernel, unless the weights are mapped, too."""
    run = jax.custom_batching.custom_vmap(partial(_launch, finish, plan=plan, outputs=outputs, name=name))

    @run.def_vmap
    def _(axis_size: int, mapped: list[bool], *inputs: jax.Array) -> tuple[tuple, tuple]:
        if mapped[1] or mapped[2]:
            def one(row: jax.Array) -> tuple[jax.Array, ...]:
                return run(*(array[row] if own else array for array, own in zip(inputs, mapped, strict=True)))
            return jax.lax.map(one, jnp.arange(axis_size)), (True,) * outputs
        x, gate, up, *wide = (array if own or place in (1, 2) else jnp.broadcast_to(array, (axis_size, *array.shape))
                              for place, (array, own) in enumerate(zip(inputs, mapped, strict=True)))
        folded = run(x.reshape(-1, x.shape[-1]), gate, up, *(array.reshape(-1, array.shape[-1]) for array in wide))
        return tuple(array.reshape(axis_size, -1, array.shape[-1]) for array in folded), (True,) * outputs

    return run(*inputs)


def _launch(finish: Callable, x_TD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, *wide_TF: jax.Array, plan: Plan,
            outputs: int, name: str) -> tuple[jax.Array, ...]:
    """Apply `finish` to x · gate, x · up and the wide inputs in one kernel; returns `outputs` arrays [T, F] in x's
    dtype."""
    (tokens, hidden), ffn, blocks = x_TD.shape, gate_DF.shape[1], plan.blocks
    steps = pl.cdiv(hidden, blocks.hidden)
    grid = (pl.cdiv(tokens, blocks.tokens), pl.cdiv(ffn, blocks.ffn), steps)
    weight = pl.BlockSpec((blocks.hidden, blocks.ffn), lambda t, f, d: (d, f))
    wide = pl.BlockSpec((blocks.tokens, blocks.ffn), lambda t, f, d: (t, f))
    size = x_TD.dtype.itemsize
    cost = pl.CostEstimate(
        flops=4 * tokens * hidden * ffn, transcendentals=tokens * ffn,
        bytes_accessed=size * (tokens * hidden * (1 if steps == 1 else grid[1]) + grid[0] * 2 * hidden * ffn
                               + (len(wide_TF) + outputs) * tokens * ffn))
    scratch = [pltpu.VMEM((blocks.tokens, blocks.ffn), jnp.float32)] * 2 if steps > 1 else []
    return pl.pallas_call(
        partial(_kernel, finish, tokens=tokens, hidden=hidden, ffn=ffn, blocks=blocks, wide=len(wide_TF),
                outputs=outputs),
        grid=grid, in_specs=[pl.BlockSpec((blocks.tokens, blocks.hidden), lambda t, f, d: (t, d)), weight, weight,
                             *[wide] * len(wide_TF)],
        out_specs=(wide,) * outputs, out_shape=(jax.ShapeDtypeStruct((tokens, ffn), x_TD.dtype),) * outputs,
        scratch_shapes=scratch, cost_estimate=cost, name=name,
        # The two cores of a v4 or v5p chip share the blocks of tokens.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                                             vmem_limit_bytes=plan.vmem_bytes),
    )(x_TD, gate_DF, up_DF, *wide_TF)


def _kernel(finish: Callable, x_ref, gate_ref, up_ref, *refs, tokens: int, hidden: int, ffn: int, blocks: Blocks,
            wide: int, outputs: int) -> None:
    """Compute one block [tokens, ffn]. VMEM after the arrays' ends holds arbitrary values, also NaN. They are never
    contracted over; their rows and columns may be computed, but are not written."""
    wide_refs, out_refs, sums = refs[:wide], refs[wide:wide + outputs], refs[wide + outputs:]
    t, f, d = (pl.program_id(axis) for axis in range(3))
    steps = pl.cdiv(hidden, blocks.hidden)

    def compute(columns: int, depth: int) -> None:
        """Multiply the first columns of the block over the first `depth` of hidden: static sizes need no mask."""
        def chunk(index: jax.Array, _) -> None:
            rows = pl.ds(pl.multiple_of(index * blocks.rows, blocks.rows), blocks.rows)
            here = (rows, pl.ds(0, columns))
            products = [jnp.dot(x_ref[rows, :depth], ref[:depth, :columns], preferred_element_type=jnp.float32)
                        for ref in (gate_ref, up_ref)]

            def write() -> None:
                for ref, value in zip(out_refs, finish(*products, *(ref[here] for ref in wide_refs)), strict=True):
                    ref[here] = value.astype(ref.dtype)

            if steps == 1:
                write()
                return
            for place, ref in enumerate(sums):
                products[place] += jnp.where(d == 0, 0.0, ref[here])
                ref[here] = products[place]
            pl.when(d == steps - 1)(write)

        jax.lax.fori_loop(0, _chunks(t, tokens=tokens, blocks=blocks), chunk, None)

    for columns, here in _parts(f, size=ffn, block=blocks.ffn, multiple=LANES):
        for depth, now in _parts(d, size=hidden, block=blocks.hidden, multiple=1):
            pl.when(here & now)(partial(compute, columns, depth))


def _chunks(t: jax.Array, *, tokens: int, blocks: Blocks) -> int | jax.Array:
    """Number of row chunks in block t of the tokens: fewer in a partial last block."""
    if tokens % blocks.tokens == 0:
        return blocks.tokens // blocks.rows
    return jnp.minimum(blocks.tokens // blocks.rows, pl.cdiv(tokens - t * blocks.tokens, blocks.rows))


def _parts(index: jax.Array, *, size: int, block: int, multiple: int) -> Iterator[tuple[int, jax.Array]]:
    """(size to compute, condition) of a block: all of it, or in a partial last block the remainder, rounded up."""
    last = pl.cdiv(size, block) - 1
    cut = pl.cdiv(size - last * block, multiple) * multiple
    if cut == block:
        yield block, index >= 0
        return
    if last:
        yield block, index < last
    yield cut, index == last
