"""Memory of the 2B train step on a TPU slice that is not here, by TPU's own compiler: attention by Pallas and by XLA.

    python benchmarks/step_memory.py [--config ct_llm_2b/pretrain] [--slice v5p:4x4x4] [--remat block …] [--output FILE]

Needs the pip extra tpu, and no TPU. The figures are bytes on each chip, as the compiler planned them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")


def compile_step(config_name: str, slice_name: str, attention: str, overrides: list[str]) -> dict[str, Any]:
    """Compile the step with one implementation of attention; what it holds on each chip."""
    from jax.experimental import topologies

    from ctllm_jax import sharding
    from ctllm_jax.config.load import load
    from ctllm_jax.config.pretrain import PretrainConfig
    from ctllm_jax.training.run import plan_step

    config = load(PretrainConfig, target=config_name, overrides=[f"compute.attention={attention}", *overrides])
    devices = topologies.get_topology_desc(platform="tpu", topology_name=slice_name).devices
    plan = plan_step(config, sharding.make_mesh(config.mesh.model_dump(), devices))
    memory = plan.compile().memory_analysis()
    gib = 2**30
    return {"peak_gib": memory.peak_memory_in_bytes / gib, "temporaries_gib": memory.temp_size_in_bytes / gib,
            "state_gib": memory.argument_size_in_bytes / gib, "rows_at_once": plan.micro_rows}


def main() -> int:
    """Compile, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="ct_llm_2b/pretrain")
    parser.add_argument("--slice", default="v5p:4x4x4")
    parser.add_argument("--remat", nargs="+", default=["block"])
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results" / "step_memory.json")
    parser.add_argument("overrides", nargs="*", help="keys of the config, key=value")
    arguments = parser.parse_args()
    columns = {}
    for remat in arguments.remat:
        for attention in ("pallas", "xla"):
            name = f"{attention}, remat {remat}"
            columns[name] = compile_step(arguments.config, arguments.slice, attention,
                                         [f"compute.remat={remat}", "data=synthetic", *arguments.overrides])
            print(name, columns[name], flush=True)
            # After each, for a compile can take ten minutes.
            write(arguments, columns)
    return 0


def write(arguments: argparse.Namespace, columns: dict[str, dict[str, Any]]) -> None:
    """The figures so far."""
    result = {"command": shlex.join(["python", "benchmarks/step_memory.py", *sys.argv[1:]]),
              "device": f"{arguments.slice}, compiled ahead of time", "python": platform.python_version(),
              "date": date.today().isoformat(),
              "versions": {name: version(name) for name in ("jax", "jaxlib", "libtpu")},
              "sections": {f"{arguments.config} on {arguments.slice}": columns}}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
