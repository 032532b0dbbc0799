"""SwiGLU's Pallas kernels against XLA: time on the device that is here, or instruction bundles for TPUs that are not.

    python benchmarks/swiglu.py time [--shapes T,D,F …] [--dtypes bfloat16 …] [--write-table]
    python benchmarks/swiglu.py bundles [--chips v5e …]

`time` runs both in turns, in one process: forward, forward and backward, and the same under `jax.checkpoint`, where
nothing wide is kept; medians. FLOPs are the useful ones: 4·TDF forward, 8·TDF backward; what is computed again is not
counted. --write-table puts what it measured on a TPU into kernels/swiglu/measured.py, where `implementation="auto"`
looks; rows of other chips stay.

`bundles` needs the extra `tpu` and no TPU: libtpu compiles both and leaves its final VLIW bundles. Of each program that
uses the MXU: bundles, MXU instructions, spills, and cycles by a model that knows one thing: bundles issue in order, one
a cycle, and an MXU is busy for 16 (v4, v5e, v5p: four of them) or 8 cycles (two) with an instruction, so that 4 cycles
an instruction are the floor everywhere. It knows neither loop trips, nor HBM,
nor latencies: it compares two programs for one chip, and is no speed.

Results are printed and written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLE = HERE.parent / "ctllm_jax/kernels/swiglu/measured.py"
MODEL = "8192,2048,5504"
SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
MXU_CYCLES = {"v4": 16, "v5e": 16, "v5p": 16, "v6e": 8, "tpu7x": 8}


def variants(implementations: dict[str, Callable], recompute: bool | None) -> dict[str, Callable]:
    """Implementation -> `(x, gate, up, dh) -> outputs`: forward for None, else forward and backward.

    Args:
      implementations: name -> `(x, gate, up, recompute)`.
      recompute: True: plain differentiation, Pallas computing its products again; False: all under `jax.checkpoint`.
    """
    import jax

    def build(function: Callable) -> Callable:
        if recompute is None:
            return lambda x, gate, up, dh: function(x, gate, up, True)
        inner = partial(function, recompute=recompute)
        if not recompute:
            inner = jax.checkpoint(inner)

        def both(x, gate, up, dh):
            h, pullback = jax.vjp(inner, x, gate, up)
            return h, pullback(dh)

        return both

    return {name: build(function) for name, function in implementations.items()}


def seconds(functions: dict[str, Callable], inputs: list, *, rounds: int, budget: float = 0.2) -> dict[str, float]:
    """Median seconds of a call, the functions taking turns; a round enqueues calls for about `budget` seconds."""
    import jax

    jitted = {name: jax.jit(function) for name, function in functions.items()}
    calls = {}
    for name, function in jitted.items():
        jax.block_until_ready(function(*inputs))
        start = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        calls[name] = max(1, round(budget / (time.perf_counter() - start)))
    times = collections.defaultdict(list)
    for _ in range(rounds):
        for name, function in jitted.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                result = function(*inputs)
            jax.block_until_ready(result)
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}


def measure_times(arguments: argparse.Namespace) -> Iterator[dict]:
    """One row for each shape, dtype and what is differentiated."""
    import jax
    import jax.numpy as jnp

    from ctllm_jax.kernels import swiglu
    from ctllm_jax.kernels.swiglu import chosen

    for shape in arguments.shapes or [MODEL if jax.default_backend() != "cpu" else "512,256,688"]:
        tokens, hidden, ffn = map(int, shape.split(","))
        for dtype in arguments.dtypes:
            able = {"xla": partial(swiglu, implementation="xla")}
            try:
                chosen("pallas", dtype=dtype)
                able["pallas"] = partial(swiglu, implementation="pallas")
            except ValueError as error:
                print(error)
            implementations = {name: lambda x, gate, up, recompute, run=run: run(x, gate, up, recompute=recompute)
                               for name, run in able.items()}
            keys = jax.random.split(jax.random.key(0), 4)
            inputs = [jax.random.normal(key, size, jnp.float32).astype(dtype) / size[0] ** (0.5 * (place in (1, 2)))
                      for place, (key, size) in enumerate(zip(keys, ((tokens, hidden), (hidden, ffn), (hidden, ffn),
                                                                     (tokens, ffn)), strict=True))]
            for what, recompute in (("forward", None), ("forward and backward", True),
                                    ("forward and backward, checkpointed", False)):
                times = seconds(variants(implementations, recompute), inputs, rounds=arguments.rounds)
                flops = (4 if recompute is None else 12) * tokens * hidden * ffn
                row = {"tokens": tokens, "hidden": hidden, "ffn": ffn, "dtype": dtype, "what": what,
                       "recompute": recompute, "ms": {name: round(1e3 * value, 4) for name, value in times.items()},
                       "tflops": {name: round(flops / value / 1e12, 3) for name, value in times.items()}}
                if "pallas" in times:
                    row["xla_over_pallas"] = round(times["xla"] / times["pallas"], 4)
                yield row


def write_table(rows: list[dict], *, device_kind: str) -> None:
    """Put the measured ratios into the table that `auto` reads.

    Raises:
      SystemExit: nothing was measured on a TPU of the kernels' own table.
    """
    from ctllm_jax.kernels.hopper import is_hopper
    from ctllm_jax.kernels.swiglu import shape_class
    from ctllm_jax.kernels.swiglu.blocks import find_chip
    from ctllm_jax.kernels.swiglu.measured import MEASURED

    chip = find_chip(device_kind)
    name = chip.name if chip else "hopper" if is_hopper(device_kind) else None
    if name is None:
        raise SystemExit(f"--write-table: no kernel ran on this {device_kind}, so there is nothing to write")
    table = dict(MEASURED)
    for row in rows:
        if row["recompute"] is not None:
            sizes = shape_class(row["tokens"], row["hidden"], row["ffn"])
            table[name, row["dtype"], sizes, row["recompute"]] = row["xla_over_pallas"]
    text = TABLE.read_text(encoding="utf-8")
    lines = "".join(f"    {key!r}: {ratio!r},\n".replace("'", '"') for key, ratio in sorted(table.items()))
    TABLE.write_text(re.sub(r"= \{\n.*?\}\n", lambda _: "= {\n" + lines + "}\n", text, count=1, flags=re.DOTALL),
                     encoding="utf-8")


def read_bundles(path: Path, *, mxu_cycles: int) -> dict:
    """Counts of one program's final bundles, and the model's cycles."""
    free: dict[str, int] = collections.defaultdict(int)
    now = bundles = instructions = spills = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if re.match(r"[^{]*:[^{]*\{", line):
            now, bundles = now + 1, bundles + 1
        spills += line.count("_spill]")
        for unit in re.findall(r"vmatmul\S*\.(mxu\d)", line):
            now = max(now, free[unit])
            free[unit] = now + mxu_cycles
            instructions += 1
    return {"bundles": bundles, "mxu_instructions": instructions, "spill_accesses": spills, "model_cycles": now}


def count_bundles(arguments: argparse.Namespace) -> Iterator[dict]:
    """One row for each chip, implementation and direction."""
    dump = Path(tempfile.mkdtemp(prefix="bundles-"))
    # Read once, when libtpu is loaded.
    os.environ["LIBTPU_INIT_ARGS"] = (f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={dump}"
                                      " --xla_jf_dump_llo_text=true")
    for name, value in (("JAX_PLATFORMS", "cpu"), ("TPU_SKIP_MDS_QUERY", "1"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")):
        os.environ.setdefault(name, value)
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from ctllm_jax.kernels.swiglu.blocks import find_chip
    from ctllm_jax.kernels.swiglu.tpu import swiglu_tpu
    from ctllm_jax.kernels.swiglu.xla import swiglu_xla

    for name in arguments.chips:
        device = topologies.get_topology_desc(platform="tpu", topology_name=SLICES[name]).devices[0]
        place, chip = jax.sharding.SingleDeviceSharding(device), find_chip(device.device_kind)

        def pallas(x, gate, up, recompute, chip=chip):
            return swiglu_tpu(x, gate, up, chip=chip, recompute=recompute)

        implementations = {"pallas": pallas, "xla": lambda x, gate, up, recompute: swiglu_xla(x, gate, up)}
        tokens, hidden, ffn = map(int, (arguments.shapes or [MODEL])[0].split(","))
        inputs = [jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=place)
                  for size in ((tokens, hidden), (hidden, ffn), (hidden, ffn), (tokens, ffn))]
        for what, recompute in (("forward", None), ("forward and backward", True)):
            for which, function in variants(implementations, recompute).items():
                for old in dump.iterdir():
                    old.unlink()
                start = time.perf_counter()
                compiled = jax.jit(function).lower(*inputs).compile()
                took = time.perf_counter() - start
                programs = {}
                for path in sorted(dump.glob("*final_bundles.txt")):
                    counts = read_bundles(path, mxu_cycles=MXU_CYCLES[name])
                    if "schedule-analysis" not in path.name and counts["mxu_instructions"]:
                        label = re.sub(r"^\d+-|-\d+-final_bundles\.txt$", "", path.name)
                        counts["cycles_per_mxu_instruction"] = round(
                            counts["model_cycles"] / counts["mxu_instructions"], 3)
                        programs[label] = counts
                yield {"chip": name, "tokens": tokens, "hidden": hidden, "ffn": ffn, "dtype": "bfloat16", "what": what,
                       "implementation": which, "programs": programs,
                       "temporaries_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
                       "compile_seconds": round(took, 1)}


def describe() -> dict:
    """What the rows were measured with."""
    import jax

    versions = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"command": shlex.join(["python", "benchmarks/swiglu.py", *sys.argv[1:]]), "versions": versions,
            "python": platform.python_version(), "device": jax.devices()[0].device_kind, "devices": jax.device_count(),
            "date": time.strftime("%Y-%m-%d"),
            # Not where the dumps lay.
            "flags": {name: re.sub(r" ?--xla_jf_dump\S*", "", os.environ.get(name, ""))
                      for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("time", "bundles"))
    parser.add_argument("--shapes", nargs="+", metavar="T,D,F", help=f"default {MODEL}; smaller on a CPU")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--chips", nargs="+", default=list(SLICES), choices=list(SLICES))
    parser.add_argument("--write-table", action="store_true", help="time: renew the table of implementation=auto")
    parser.add_argument("--output", type=Path, help="default benchmarks/results/swiglu_MODE.json")
    arguments = parser.parse_args()
    output = arguments.output or HERE / f"results/swiglu_{arguments.mode}.json"
    rows = []
    for row in (measure_times if arguments.mode == "time" else count_bundles)(arguments):
        print(json.dumps(row), flush=True)
        rows.append(row)
        # After each, as a chip's compiles take minutes.
        output.write_text(json.dumps(describe() | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {os.path.relpath(output)}")
    if arguments.write_table:
        import jax

        write_table(rows, device_kind=jax.devices()[0].device_kind)
        print(f"written to {os.path.relpath(TABLE)}")


if __name__ == "__main__":
    main()
