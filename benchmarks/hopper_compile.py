"""What CUDA's compiler makes of the Hopper kernels, on a machine without a GPU.

Matrix and copy instructions, registers, spills and shared memory, for the default block sizes and for those that are
worth measuring:

  python benchmarks/hopper_compile.py --output benchmarks/results/hopper_compile.json

Needs the packages that ctllm_jax/cluster/gpu_target.py names. None of these numbers is a speed.
"""

import argparse
import atexit
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

# Read by the compiler when it is loaded.
DUMP = Path(tempfile.mkdtemp(prefix="hopper_compile_"))
atexit.register(shutil.rmtree, DUMP, ignore_errors=True)
os.environ["MOSAIC_GPU_DUMP_TO"] = str(DUMP)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from hopper_speed import ATTENTION_BLOCKS, SWIGLU_BLOCKS, changes  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from ctllm_jax.cluster.gpu_target import find_gpus  # noqa: E402
from ctllm_jax.kernels.attention import hopper as attention  # noqa: E402
from ctllm_jax.kernels.attention.fused import Request  # noqa: E402
from ctllm_jax.kernels.attention.hopper_blocks import HopperBlocks  # noqa: E402
from ctllm_jax.kernels.swiglu import hopper as swiglu  # noqa: E402
from ctllm_jax.kernels.swiglu.hopper import SwigluBlocks  # noqa: E402

ATTENTION_SHAPES = {
    "2B, causal": Request(4096, 16, 16, 128, "bfloat16", True, None, 128**-0.5, True, False, "gpu", "H100"),
    "2B, both directions": Request(4096, 16, 16, 128, "bfloat16", False, None, 128**-0.5, True, False, "gpu", "H100"),
    "GQA 4, 32k": Request(32768, 32, 8, 128, "bfloat16", True, None, 128**-0.5, True, False, "gpu", "H100"),
    "head dim 64": Request(4096, 32, 32, 64, "bfloat16", True, None, 64**-0.5, True, False, "gpu", "H100"),
}
SWIGLU_SHAPES = {"2B": (8192, 2048, 5504)}


def attention_cases(name: str, request: Request, blocks: HopperBlocks) -> Iterator[tuple[str, Callable, dict]]:
    """(case, lower, shared bytes that we count for each kernel)."""
    query, key = (jax.ShapeDtypeStruct((1, request.length, n, request.head_dim), request.dtype)
                  for n in (request.heads, request.kv_heads))
    ids = jax.ShapeDtypeStruct((1, request.length), jnp.int32)
    numbers = jax.ShapeDtypeStruct((1, request.heads, request.length), jnp.float32)
    counted = {f"attention_{kernel}": blocks.shared_bytes(kernel, request.head_dim)
               for kernel in ("forward", "dkv", "dq")}
    changed = changes(blocks)
    if not changed or any(key.startswith(("forward", "alternate")) for key in changed):
        yield name, partial(attention.forward, request, blocks=blocks), (query, key, key, ids), counted
    if not changed or any(key.startswith("d") for key in changed):
        yield (name, lambda *arrays: attention.backward(request, *arrays[:4], None, *arrays[4:], blocks=blocks),
               (query, key, key, ids, query, numbers, numbers), counted)


def swiglu_cases(name: str, shape: tuple[int, int, int], blocks: SwigluBlocks) -> Iterator[tuple[str, Callable, dict]]:
    """As `attention_cases`."""
    tokens, hidden, ffn = shape
    x, weight, wide = (jax.ShapeDtypeStruct(size, jnp.bfloat16)
                       for size in ((tokens, hidden), (hidden, ffn), (tokens, ffn)))
    counted = {f"swiglu_{mode}": blocks.shared_bytes(mode) for mode in swiglu.MODES}
    options = dict(blocks=blocks, multiprocessors=132)
    for mode in swiglu.MODES:
        arrays = (x, weight, weight, wide) if mode == "gradients" else (x, weight, weight)
        yield name, partial(swiglu.swiglu_arrays, mode, **options), arrays, counted


def compile_case(function: Callable, shapes: tuple, device: jax.Device) -> Iterator[dict]:
    """A row for each kernel of a function."""
    for path in DUMP.iterdir():
        path.unlink()
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)) for x in shapes]
    jax.jit(function).lower(*arguments).compile()
    for path in sorted(DUMP.glob("*.ptx")):
        # The log holds the module before and after each pass, and is large: what is sought stands near its head.
        with open(path.with_suffix(".mlir-passes.log"), encoding="utf-8", errors="replace") as log:
            shared = re.search(r"dynamic_shared_memory_size %c(\d+)_i32", log.read(1 << 20))
        ptx, report = path.read_text(), path.with_suffix(".ptxas").read_text()
        sass = path.with_suffix(".sass_ctrl")
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads\n", report)
        used = {int(number) for number in re.findall(r"\bR(\d+)\b", sass.read_text())} if sass.exists() else {-1}
        yield {"kernel": path.stem.rpartition("_")[0], "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
               "tma": len(re.findall(r"cp\.async\.bulk\.tensor|cp\.async\.bulk\.shared", ptx)),
               "launch_registers": int(re.search(r"Used (\d+) registers", report)[1]),
               "highest_register": max(used) if max(used) >= 0 else None,
               "spill_bytes": int(spills[1]) + int(spills[2]),
               "serialized": len(re.findall(r"C7510|C7517", report)), "shared_bytes": int(shared[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only-defaults", action="store_true", help="one shape of each op, with its default blocks")
    options = parser.parse_args()
    device, sections = find_gpus("h100")[0], {}
    first = next(iter(ATTENTION_SHAPES))
    cases = [(blocks, *case) for name, request in ATTENTION_SHAPES.items() for blocks in
             (ATTENTION_BLOCKS if name == first else ATTENTION_BLOCKS[:1])
             for case in attention_cases(name, request, blocks)]
    cases += [(blocks, *case) for name, shape in SWIGLU_SHAPES.items() for blocks in SWIGLU_BLOCKS
              if blocks.band == swiglu.DEFAULT_BLOCKS.band for case in swiglu_cases(name, shape, blocks)]
    defaults = attention.DEFAULT_BLOCKS, swiglu.DEFAULT_BLOCKS
    if options.only_defaults:
        cases = [case for case in cases if case[0] in defaults and case[1] in (first, *SWIGLU_SHAPES)]
    versions = {name: importlib.metadata.version(name) for name in (
        "jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc")}
    for blocks, name, function, shapes, counted in cases:
        changed, began = changes(blocks), time.perf_counter()
        try:
            results = list(compile_case(function, shapes, device))
        except ValueError as error:
            print(f"{name} {changed}: {error}")
            continue
        for row in results:
            kernel = row.pop("kernel")
            row["counted_shared_bytes"] = counted[kernel]
            title = ", ".join([name, *(f"{key}={value}" for key, value in changed.items())])
            sections.setdefault(kernel, {})[title] = row
            print(f"{time.perf_counter() - began:5.1f} s  {kernel}, {title}:"
                  f" {row['wgmma']} wgmma, {row['tma']} TMA, R{row['highest_register']}, {row['spill_bytes']} B"
                  f" spilled, {row['shared_bytes']} B shared, {row['serialized']} serialized", flush=True)
        if options.output:  # After each, because the whole takes minutes.
            result = {"command": shlex.join(["python", *sys.argv]), "device": "H100 (sm_90a), compiled ahead of time",
                      "versions": versions, "sections": sections}
            options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
