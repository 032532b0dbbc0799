"""Attention's cases for `launch.py kernels`: what is checked, timed and compiled.

Legend: B batch, S sequence, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from ctllm_jax.kernels.attention import attention, make_request
from ctllm_jax.kernels.attention.fused import Request
from ctllm_jax.kernels.attention.host import attention_float64
from ctllm_jax.kernels.dispatch import Name
from ctllm_jax.kernels.registry import Bench, Check, Compile
from ctllm_jax.kernels.topology import find_topology

TOLERANCES = {"float32": 2e-5, "bfloat16": 0.02}
"""Largest error, relative to the largest number of its array (at least 1)."""

# name -> (S, N, K, H, packed, other options): aligned and odd lengths, grouped heads, one and many documents, both
# directions.
CHECKS: dict[str, tuple[int, int, int, int, bool, dict[str, int]]] = {
    "one document": (1024, 4, 4, 128, False, {}),
    "packed": (1024, 4, 4, 128, True, {}),
    "packed, GQA, odd length": (777, 4, 2, 128, True, {}),
    "packed, head dim 64": (512, 4, 1, 64, True, {}),
    "packed, head dim 256": (640, 2, 1, 256, True, {}),
    "packed, both directions": (512, 4, 2, 128, True, {"causal": False}),
    "packed, window": (777, 2, 2, 128, True, {"sliding_window": 130}),
    "packed, positions": (512, 2, 2, 128, True, {"positions": True}),
    "long": (4096, 2, 1, 128, True, {}),
}


def draw_segments(length: int, *, rows: int, seed: int) -> np.ndarray:
    """Segment ids [rows, length] of documents of random lengths, some of one token, with padding at the end and
    inside."""
    random = np.random.default_rng(seed)
    ids = np.zeros((rows, length), np.int32)
    for row in range(rows):
        lengths = np.maximum(1, random.exponential(length / 5, size=length).astype(int))
        lengths[1:3] = 1
        ids[row] = np.repeat(np.arange(1, length + 1), lengths)[:length]
        ids[row, length - random.integers(length // 8 + 1):] = 0
    if length > 8:
        ids[0, 5:7] = 0
    return ids


def draw_inputs(length: int, heads: int, kv_heads: int, head_dim: int, *, dtype: str, packed: bool, rows: int = 2,
                seed: int = 0, positions: bool = False) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    """Return ([query, key, value, cotangent], {segment_ids, positions} if requested): normal numbers, rounded to
    `dtype`."""
    random = np.random.default_rng(seed)
    arrays = [jnp.asarray(random.standard_normal((rows, length, n, head_dim), np.float32), dtype)
              for n in (heads, kv_heads, kv_heads, heads)]
    ids = {}
    if packed:
        ids["segment_ids"] = jnp.asarray(draw_segments(length, rows=rows, seed=seed))
    if positions:
        ids["positions"] = jnp.asarray(np.stack([random.permutation(length) for _ in range(rows)]), jnp.int32)
    return arrays, ids


def largest_errors(results: Any, exact: Any, *, dtype: str) -> dict[str, tuple[float, float]]:
    """(y, lse, gradients) against float64: what -> (largest error, its tolerance)."""
    errors = {}
    for name, ours, theirs in zip(("y", "lse", "dq", "dk", "dv"), results, exact, strict=True):
        ours = np.asarray(jnp.asarray(ours, jnp.float32), np.float64)
        size = max(1.0, float(np.max(np.abs(np.where(theirs > -1e29, theirs, 0)))))
        # Not `max`, which would ignore a NaN.
        apart = np.abs(ours - theirs) / np.where(theirs > -1e29, size, 1e30)
        errors[name] = (float(np.sort(apart, axis=None)[-1]), TOLERANCES[dtype])
    return errors


def checks() -> Iterator[Check]:
    """Forward, log-sum-exp and gradients of each case in each dtype."""
    for name, (length, heads, kv_heads, head_dim, packed, options) in CHECKS.items():
        for dtype in TOLERANCES:
            yield Check("attention", f"{name}, {dtype}", partial(
                _compare, length, heads, kv_heads, head_dim, packed, dict(options), dtype))


def _compare(length, heads, kv_heads, head_dim, packed, options, dtype, implementation):
    options = dict(options)
    (query, key, value, cotangent), ids = draw_inputs(
        length, heads, kv_heads, head_dim, dtype=dtype, packed=packed, positions=options.pop("positions", False))
    # On a GPU or TPU, float32 matmuls use fewer bits by default, which is not what this checks.
    with jax.default_matmul_precision("highest"):
        def function(query, key, value, cotangent, ids):
            y, pullback, lse = jax.vjp(partial(_with_lse, implementation=implementation, **options, **ids),
                                       query, key, value, has_aux=True)
            return y, lse, *pullback(cotangent)

        results = jax.jit(function)(query, key, value, cotangent, ids)
    exact = attention_float64(query.astype(jnp.float32), key.astype(jnp.float32), value.astype(jnp.float32),
                              cotangent.astype(jnp.float32), **ids, **options)
    return largest_errors(results, exact, dtype=dtype)


def _with_lse(query, key, value, **options):
    return attention(query, key, value, return_lse=True, **options)


def benches(*, lengths: list[int], heads: int, kv_heads: int, head_dim: int, rows: int, dtype: str,
            **_: Any) -> Iterator[Bench]:
    """Time forward, and forward with backward, causal: for one document per row, and for packed rows."""
    for length in lengths:
        for packed in (False, True):
            for backward in (False, True):
                request = make_request(length=length, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
                sizes = {"length": length, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype,
                         "rows": rows, "packed": packed, "backward": backward}
                yield Bench("attention", f"S {length}, {'packed' if packed else 'one document'},"
                            f" {'forward + backward' if backward else 'forward'}",
                            _flops(request, rows, backward=backward), ("pallas", "cudnn", "xla"),
                            partial(_prepare, request, rows=rows, packed=packed, backward=backward), sizes)


def _flops(request: Request, rows: int, *, backward: bool) -> float:
    """FLOPs of the causal half, as if all segments were one; 2 matmuls forward, 5 backward."""
    scores = rows * request.heads * request.length**2 / 2
    return 2 * scores * request.head_dim * (7 if backward else 2)


def _prepare(request: Request, implementation: Name, *, rows: int, packed: bool, backward: bool):
    (*inputs, cotangent), ids = draw_inputs(request.length, request.heads, request.kv_heads, request.head_dim,
                                            dtype=request.dtype, packed=packed, rows=rows)
    function = partial(attention, implementation=implementation, **ids)

    def both(query, key, value, cotangent):
        return jax.vjp(function, query, key, value)[1](cotangent)

    return (jax.jit(both), (*inputs, cotangent)) if backward else (jax.jit(function), tuple(inputs))


# (S, N, K, H, dtype): what is compiled for every chip.
COMPILES = ((4096, 16, 16, 128, "bfloat16"), (4096, 8, 2, 128, "float32"), (2048, 4, 1, 64, "bfloat16"),
            (2048, 4, 1, 256, "bfloat16"), (32768, 2, 1, 128, "bfloat16"))


def compiles(*, chips: list[str]) -> Iterator[Compile]:
    """Both passes, packed, with the block sizes of the table."""
    for chip in chips:
        devices = find_topology(chip)
        for length, heads, kv_heads, head_dim, dtype in COMPILES:
            request = make_request(length=length, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
            request = request._replace(platform="tpu", device_kind=devices[0].device_kind)
            yield from compile_cases(request, chip, devices[0])


def compile_cases(request: Request, chip: str, device: jax.Device, *, blocks: Any = None) -> list[Compile]:
    """Lower the two passes of one request; `blocks` as for `tpu.forward`."""
    from ctllm_jax.kernels.attention import tpu, tpu_blocks

    chosen = blocks or tpu_blocks.choose_blocks(request, chip)
    name = f"S {request.length}, N {request.heads}, K {request.kv_heads}, H {request.head_dim}, {request.dtype}"
    return [Compile(chip, "attention", f"{way}, {name}", vmem(chosen, request),
                    partial(_lower, request, function, device, blocks=blocks, way=way))
            for way, function, vmem in (("forward", tpu.forward, tpu_blocks.forward_vmem),
                                        ("backward", tpu.backward, tpu_blocks.backward_vmem))]


def _lower(request: Request, function, device: jax.Device, *, blocks, way: str):
    def abstract(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    query, key = (abstract((1, request.length, n, request.head_dim), request.dtype)
                  for n in (request.heads, request.kv_heads))
    ids = abstract((1, request.length), jnp.int32)
    arguments = [query, key, key, ids if request.segments else None, ids if request.positions else None]
    if way == "backward":
        arguments += [query, *[abstract((1, request.heads, request.length), jnp.float32)] * 2]
    return jax.jit(partial(function, request, blocks=blocks)).lower(*arguments)
