"""The Hopper kernels on a Hopper GPU: right or wrong, and how fast, for each candidate of their block sizes.

  python benchmarks/hopper_speed.py --output hopper_speed.json

Every candidate is first compared with the dense reference in float32 on packed rows, forward and backward, and only a
right one is timed; beside them stand cuDNN (one document a row, which is all that it takes) and XLA. It ends with the
lines for `FASTEST` (kernels/attention/hopper.py). Sizes are those of the 2B model.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ctllm_jax.kernels.attention import attention, hopper, make_request
from ctllm_jax.kernels.attention.fused import Kernels, Request, fused_attention
from ctllm_jax.kernels.attention.hopper_blocks import HopperBlocks
from ctllm_jax.kernels.attention.reference import attention_reference
from ctllm_jax.kernels.hopper import is_hopper
from ctllm_jax.kernels.swiglu.hopper import SwigluBlocks, swiglu_hopper
from ctllm_jax.kernels.swiglu.reference import swiglu_reference
from ctllm_jax.kernels.swiglu.xla import swiglu_xla

ATTENTION_BLOCKS = [
    HopperBlocks(), HopperBlocks(alternate=False), HopperBlocks(forward_keys=64, forward_stages=4),
    HopperBlocks(forward_groups=3, forward_keys=64, forward_stages=3), HopperBlocks(dkv_stages=3, dq_stages=4),
]
SWIGLU_BLOCKS = [
    SwigluBlocks(), SwigluBlocks(band=8), SwigluBlocks(columns=192, stages=3, backward_stages=2),
    SwigluBlocks(groups=3, stages=3, backward_stages=2), SwigluBlocks(columns=64, stages=6, backward_stages=4),
]
TOLERANCE = 0.02
"""Of the largest number of an array, in bfloat16."""


def changes(blocks: HopperBlocks | SwigluBlocks) -> dict:
    """What differs from the default sizes."""
    default = type(blocks)()
    return {key: value for key, value in vars(blocks).items() if value != getattr(default, key)}


def seconds(function: Callable, arguments: tuple, *, calls: int = 20, repeats: int = 5) -> float:
    """Of one call: the best mean of some in a row, which the host does not hold up."""
    function = jax.jit(function)
    jax.block_until_ready(function(*arguments))
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - began) / calls)
    return best


def draw(*shapes: tuple[int, ...]) -> list[jax.Array]:
    """Normal numbers in bfloat16."""
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal(shape, np.float32), jnp.bfloat16) for shape in shapes]


def documents(rows: int, length: int) -> jax.Array:
    """Segment ids of documents of 700 tokens on average, and padding at the end."""
    random = np.random.default_rng(1)
    ids = [np.repeat(np.arange(1, length + 1), random.geometric(1 / 700, length))[:length] for _ in range(rows)]
    ids = np.stack(ids).astype(np.int32)
    ids[:, length - 20:] = 0
    return jnp.asarray(ids)


def largest_error(ours, exact) -> float:
    """Over all arrays, of the largest number of each; NaN stays NaN."""
    errors = [np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)) / max(1e-9, float(jnp.max(jnp.abs(y))))
              for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True)]
    return float(np.max([np.max(error) for error in errors]))


def with_gradients(function: Callable) -> Callable:
    """`function(*inputs)` and its gradients along a cotangent, which comes last."""
    def both(*inputs):
        result, pullback = jax.vjp(function, *inputs[:-1])
        return result, pullback(inputs[-1])

    return both


def attention_function(request: Request, blocks: HopperBlocks, segments: jax.Array | None) -> Callable:
    """Attention by the kernels with these blocks."""
    kernels = Kernels(partial(hopper.forward, blocks=blocks), partial(hopper.backward, blocks=blocks))
    return lambda *arrays: fused_attention(kernels, *arrays, segment_ids=segments, positions=None, request=request)[0]


def attention_error(blocks: HopperBlocks) -> float:
    """Of output and gradients, packed, GQA, an odd length."""
    request, segments = make_request(length=1001, heads=4, kv_heads=2, head_dim=128), documents(2, 1001)
    inputs = draw((2, 1001, 4, 128), (2, 1001, 2, 128), (2, 1001, 2, 128), (2, 1001, 4, 128))
    ours = jax.jit(with_gradients(attention_function(request, blocks, segments)))(*inputs)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(with_gradients(partial(attention_reference, segment_ids=segments)))(
            *(x.astype(jnp.float32) for x in inputs))
    return largest_error(ours, exact)


def measure_attention(rows: list[dict], lengths: list[int], tokens: int) -> None:
    """Forward, and forward with backward, by length, of one document a row and of packed ones."""
    right = []
    for blocks in ATTENTION_BLOCKS:
        error = attention_error(blocks)
        add(rows, op="attention", what="check", by="pallas", blocks=changes(blocks), error=error,
            good=error < TOLERANCE)
        right += [blocks] if error < TOLERANCE else []
    for length in lengths:
        batch = max(1, tokens // length)
        inputs = draw(*[(batch, length, 16, 128)] * 4)
        request = make_request(length=length, heads=16, kv_heads=16, head_dim=128)
        for packed in (False, True):
            segments = documents(batch, length) if packed else None
            functions = [("pallas", changes(blocks), attention_function(
                request._replace(segments=packed), blocks, segments)) for blocks in right]
            functions += [(name, {}, partial(attention, segment_ids=segments, implementation=name))
                          for name in ("cudnn", "xla")]
            for by, blocks, function in functions:
                try:
                    for what, matmuls, timed, arguments in (
                            ("forward", 2, function, inputs[:3]),
                            ("forward + backward", 7, with_gradients(function), inputs)):
                        taken = seconds(timed, tuple(arguments))
                        # As if every row were one document: packed rows may seem faster than the hardware.
                        flops = 2 * matmuls * batch * 16 * length**2 / 2 * 128
                        add(rows, op="attention", what=what, by=by, blocks=blocks, length=length, packed=packed,
                            seconds=taken, tflops=flops / taken / 1e12)
                except ValueError as error:
                    print(f"{by}: {error}")


def measure_swiglu(rows: list[dict], tokens: int) -> None:
    """tokens × 2048 × 5504, the backward pass with products kept and computed again."""
    x, gate, up, cotangent = draw((tokens, 2048), (2048, 5504), (2048, 5504), (tokens, 5504))
    inputs = x, gate / 64, up / 64, cotangent
    small = x[:1001], gate / 64, up / 64, cotangent[:1001]
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(with_gradients(swiglu_reference))(*(x.astype(jnp.float32) for x in small))
    processors = jax.devices()[0].core_count
    functions = [("xla", {}, swiglu_xla)]
    for blocks in SWIGLU_BLOCKS:
        for recompute in (True, False):
            function = partial(swiglu_hopper, blocks=blocks, recompute=recompute, multiprocessors=processors)
            error = largest_error(jax.jit(with_gradients(function))(*small), exact)
            named = {**changes(blocks), "recompute": recompute}
            add(rows, op="swiglu", what="check", by="pallas", blocks=named, error=error, good=error < TOLERANCE)
            functions += [("pallas", named, function)] if error < TOLERANCE else []
    for by, blocks, function in functions:
        for what, matmuls, timed, arguments in (("forward", 2, function, inputs[:3]),
                                                ("forward + backward", 6, with_gradients(function), inputs)):
            taken = seconds(timed, tuple(arguments))
            add(rows, op="swiglu", what=what, by=by, blocks=blocks, tokens=tokens, seconds=taken,
                tflops=2 * matmuls * tokens * 2048 * 5504 / taken / 1e12)


def add(rows: list[dict], **row) -> None:
    rows.append(row)
    print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" if key == "blocks" else
                    str(value) for key, value in row.items()), flush=True)


def fastest_lines(rows: list[dict]) -> list[str]:
    """(head dim, dtype, segments) where the kernels beat everything else both ways, at every length measured."""
    lines = []
    for packed in (False, True):
        timed = [row for row in rows if row.get("packed") == packed and "seconds" in row]
        kinds = {(row["length"], row["what"]) for row in timed}
        ours, others = ({kind: min((row["seconds"] for row in timed if (row["length"], row["what"]) == kind
                                    and (row["by"] == "pallas") == pallas), default=float("inf")) for kind in kinds}
                        for pallas in (True, False))
        if kinds and all(ours[kind] < others[kind] < float("inf") for kind in kinds):
            lines.append(f'(128, "bfloat16", {packed})')
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--tokens", type=int, default=16384, help="in all rows of a batch")
    options = parser.parse_args()
    kind, rows = jax.devices()[0].device_kind, []
    if not is_hopper(kind):
        raise SystemExit(f"this measures Hopper's kernels on a Hopper GPU, and this is {kind}")
    measure_attention(rows, options.lengths, options.tokens)
    measure_swiglu(rows, options.tokens)
    print("FASTEST:", ", ".join(fastest_lines(rows)) or "nothing")
    if options.output:
        options.output.write_text(json.dumps({"device": kind, "jax": jax.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
