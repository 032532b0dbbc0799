"""The 2B pretraining step compiled for slices and GPUs that are not here: memory, what is sent, and the bound.

    python benchmarks/compile_table.py [NAME …]

Each column is `launch.py compile CONFIG topology=NAME`, run by itself: the config for that hardware in
configs/ct_llm_2b/ where there is one, else pretrain.yaml. With names only these are compiled anew, the others stay as
they are. Needs the extra `tpu`, and for GPUs what ctllm_jax/cluster/gpu_target.py names; two to four minutes a slice on
two cores. What the compilers say, and arithmetic with the makers' peaks: nothing runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from data_loading import cpu_name

REPOSITORY = Path(__file__).resolve().parent.parent
OUTPUT = REPOSITORY / "benchmarks" / "results" / "compile_table.json"
COPIES = "v5e:16x16 remote_copies"  # the same with compute.gradient_rings=remote_copies
CONFIGS = {"v4:4x4x4": "pretrain", "v5e:16x16": "v5e_256", COPIES: "v5e_256", "v5p:4x4x4": "pretrain",
           "v5p-64": "v5p_64", "v5p-256": "v5p_256", "v6e:16x16": "v6e_256", "tpu7x:4x4x4": "pretrain",
           "h100:1": "h100", "h100:8": "h100_8", "8*a3-highgpu-8g": "h100_8x8"}
GIB, MIB = 2**30, 2**20


def compile_one(name: str) -> dict[str, Any]:
    """What `launch.py compile` writes."""
    with tempfile.TemporaryDirectory() as folder:
        output, (topology, *rings) = Path(folder) / "compile.json", name.split()
        command = [sys.executable, "launch.py", "compile", f"configs/ct_llm_2b/{CONFIGS[name]}.yaml",
                   f"topology={topology}", *(f"compute.gradient_rings={each}" for each in rings), f"output={output}"]
        status = subprocess.run(command, cwd=REPOSITORY).returncode
        if not output.exists():
            raise SystemExit(f"{' '.join(command)}: status {status}, and nothing written")
        return json.loads(output.read_text())


def column(written: dict[str, Any]) -> dict[str, Any]:
    """The figures of one topology."""
    [result] = written["results"]
    topology, chosen = result["topology"], result["chosen"]
    memory, bound, sent = chosen["memory"], chosen["roofline"], chosen["collectives"] or []
    waited = [each for each in sent if not each["asynchronous"]]
    return {
        "config": CONFIGS[topology["name"]], "devices": topology["devices"],
        "mesh": " x ".join(f"{axis} {size}" for axis, size in chosen["mesh"].items() if size > 1) or "–",
        "rows x accumulated": f"{chosen['rows_per_device']} x {chosen['accumulation']}",
        "remat": chosen["remat"], "attention": chosen["implementations"]["attention"],
        "fits": "yes" if chosen["fits"] else "no",
        "peak GiB": chosen["peak"] / GIB, "capacity GiB": chosen["capacity"] / GIB,
        "parameters GiB": memory["parameters"] / GIB, "optimizer GiB": memory["optimizer"] / GIB,
        "temporaries GiB": memory["temporaries"] / GIB,
        "sent GiB": sum(each["sent"] for each in sent) / GIB if sent else None,
        "of it synchronous GiB": sum(each["sent"] for each in waited) / GIB if sent else None,
        "largest synchronous MiB": max((each["payload"] for each in waited), default=0) / MIB if sent else None,
        "compute seconds": bound["compute"], "memory seconds": bound["memory"], "network seconds": bound["network"],
        "network exposed seconds": bound["exposed"], "step at least seconds": bound["step"],
        "MFU at most, causal": bound["mfu_causal"], "compile seconds": float(chosen["compile_seconds"]),
    }


def main() -> None:
    """Compile, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CONFIGS)}; none: all")
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in CONFIGS]:
        parser.error(f"unknown: {', '.join(unknown)}")
    kept = json.loads(OUTPUT.read_text())["figures"] if names and OUTPUT.exists() else {}
    versions: dict[str, str] = json.loads(OUTPUT.read_text())["versions"] if kept else {}
    for name in names or CONFIGS:
        written = compile_one(name)
        kept[name], versions = column(written), versions | written["versions"]
        ordered = {each: kept[each] for each in CONFIGS if each in kept}
        OUTPUT.write_text(json.dumps({
            "figures": ordered, "device": f"compiled on {cpu_name()}", "python": platform.python_version(),
            "versions": versions, "command": "python benchmarks/compile_table.py"}, indent=1) + "\n")


if __name__ == "__main__":
    main()
