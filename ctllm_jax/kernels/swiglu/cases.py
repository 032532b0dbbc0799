"""SwiGLU's cases for `launch.py kernels`: what is checked, timed and compiled.

Legend: T tokens, D hidden, F FFN.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from ctllm_jax.kernels.dispatch import Name
from ctllm_jax.kernels.registry import Bench, Check, Compile
from ctllm_jax.kernels.swiglu import swiglu, tpu
from ctllm_jax.kernels.swiglu.blocks import Blocks, Chip, choose_blocks, find_chip
from ctllm_jax.kernels.topology import find_topology

TOLERANCES = {"float32": 2e-5, "bfloat16": 0.02}
"""Largest error, relative to the largest number of its array (at least 1)."""

# name -> (T, D, F): whole blocks, the model's shape with few tokens, and sizes that no block divides.
CHECKS = {"whole blocks": (512, 256, 512), "the model's widths": (256, 2048, 5504), "odd sizes": (777, 320, 704),
          "one token": (1, 128, 256)}
COMPILES = ((4096, 2048, 5504, "bfloat16"), (4096, 2048, 5504, "float32"), (1000, 300, 700, "bfloat16"))


def draw_inputs(tokens: int, hidden: int, ffn: int, *, dtype: str, seed: int = 0) -> list[jax.Array]:
    """x [T, D], gate and up [D, F] of a size that keeps products near 1, and a cotangent [T, F]; rounded to `dtype`."""
    random = np.random.default_rng(seed)
    shapes = ((tokens, hidden, 1.0), (hidden, ffn, hidden**-0.5), (hidden, ffn, hidden**-0.5), (tokens, ffn, 1.0))
    return [jnp.asarray(scale * random.standard_normal((rows, columns), np.float32), dtype)
            for rows, columns, scale in shapes]


def swiglu_float64(x: Any, gate: Any, up: Any, cotangent: Any) -> list[np.ndarray]:
    """Compute h, dx, dgate and dup on the host, by the formulas."""
    x, gate, up, cotangent = (np.asarray(jnp.asarray(array, jnp.float32), np.float64)
                              for array in (x, gate, up, cotangent))
    gated, raised = x @ gate, x @ up
    share = 1 / (1 + np.exp(-gated))
    d_gated = cotangent * raised * share * (1 + gated * (1 - share))
    d_raised = cotangent * gated * share
    return [gated * share * raised, d_gated @ gate.T + d_raised @ up.T, x.T @ d_gated, x.T @ d_raised]


def checks() -> Iterator[Check]:
    """Check output and gradients of each case in each dtype, with saved and with recomputed products."""
    for name, sizes in CHECKS.items():
        for dtype in TOLERANCES:
            for recompute in (True, False):
                kept = "recomputed" if recompute else "kept"
                yield Check("swiglu", f"{name}, {dtype}, products {kept}", partial(_compare, sizes, dtype, recompute))


def _compare(sizes, dtype, recompute, implementation):
    inputs = draw_inputs(*sizes, dtype=dtype)
    # As for attention: the precision that a matmul may drop to is not checked here.
    with jax.default_matmul_precision("highest"):
        results = jax.jit(partial(_both, implementation=implementation, recompute=recompute))(*inputs)
    errors = {}
    for name, ours, theirs in zip(("h", "dx", "dgate", "dup"), results, swiglu_float64(*inputs), strict=True):
        apart = np.abs(np.asarray(jnp.asarray(ours, jnp.float32), np.float64) - theirs)
        # Not `max`, which would ignore a NaN.
        errors[name] = (float(np.sort(apart, axis=None)[-1]) / max(1.0, float(np.abs(theirs).max())), TOLERANCES[dtype])
    return errors


def _both(x, gate, up, cotangent, **options):
    h, pullback = jax.vjp(partial(swiglu, **options), x, gate, up)
    return h, *pullback(cotangent)


def benches(*, lengths: list[int], rows: int, hidden: int, ffn: int, dtype: str, **_: Any) -> Iterator[Bench]:
    """Time forward, and forward with backward, with saved and with recomputed products."""
    for length in lengths:
        sizes = {"tokens": rows * length, "hidden": hidden, "ffn": ffn, "dtype": dtype}
        for backward, recompute in ((False, False), (True, True), (True, False)):
            kept = ("" if not backward else ", products recomputed" if recompute else ", products kept")
            yield Bench("swiglu", f"T {rows * length} x {hidden} x {ffn}, "
                        f"{'forward + backward' if backward else 'forward'}{kept}",
                        2.0 * rows * length * hidden * ffn * (6 if backward else 2), ("pallas", "xla"),
                        partial(_prepare, backward=backward, recompute=recompute, tokens=rows * length, hidden=hidden,
                                ffn=ffn, dtype=dtype), sizes)


def _prepare(implementation: Name, *, tokens, hidden, ffn, dtype, backward: bool, recompute: bool):
    inputs = draw_inputs(tokens, hidden, ffn, dtype=dtype)
    function = partial(_both if backward else swiglu, implementation=implementation, recompute=recompute)
    return jax.jit(function), tuple(inputs if backward else inputs[:3])


def compiles(*, chips: list[str]) -> Iterator[Compile]:
    """Both kernels with the block sizes of the table, without the matmuls that XLA computes after them."""
    for name in chips:
        device = find_topology(name)[0]
        chip = find_chip(device.device_kind)
        assert chip is not None, f"{name} has no block sizes"
        for tokens, hidden, ffn, dtype in COMPILES:
            itemsize = jnp.dtype(dtype).itemsize
            blocks = choose_blocks(chip, tokens=tokens, hidden=hidden, ffn=ffn, itemsize=itemsize)
            for way in ("forward", "backward"):
                yield Compile(name, "swiglu", f"{way}, T {tokens}, D {hidden}, F {ffn}, {dtype}",
                              sum(blocks.vmem(hidden=hidden, itemsize=itemsize).values()),
                              partial(_lower, device, chip, blocks, (tokens, hidden, ffn), dtype, way))


def _lower(device: jax.Device, chip: Chip, blocks: Blocks, sizes: tuple[int, int, int], dtype: str, way: str):
    tokens, hidden, ffn = sizes
    place = SingleDeviceSharding(device)
    x, gate, up, dh = (jax.ShapeDtypeStruct(shape, dtype, sharding=place)
                       for shape in ((tokens, hidden), (hidden, ffn), (hidden, ffn), (tokens, ffn)))
    if way == "forward":
        return jax.jit(partial(tpu.swiglu_tpu, chip=chip, blocks=blocks)).lower(x, gate, up)
    plan = tpu.Plan(blocks, chip.vmem_bytes, recompute=True)
    return jax.jit(partial(tpu.products_gradient, plan=plan)).lower(x, gate, up, dh)
