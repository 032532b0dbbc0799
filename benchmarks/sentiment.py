"""Positive reviews before and after DPO on the quickstart's model, over several seeds, as snownlp's classifier judges.

    python benchmarks/sentiment.py [--base runs/quickstart] [--seeds 1 2 3]

The stages behind the pretraining run `--base` (make it with `launch.py quickstart`), once a seed: it decides the order
of the dialogues and pairs, and the draws of the answers. 300 answers of each model to the same prompts with the same
seeds; intervals are Wilson's, 95 %. Runs are kept beside the base, and a seed that is there is not trained again.
The result is printed and written to benchmarks/results/. Needs the extra `quickstart`; minutes a seed on two cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_loading import cpu_name

# As a user's shell: one CPU device. Set before jax is imported, which is inside of the functions.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

PACKAGES = ("jax", "jaxlib", "flax", "optax", "snownlp")
FIGURES = ("distinct", "commonest", "distinct_bigrams", "characters", "ended", "copied")


def measure(base: Path, seeds: list[int]) -> dict[int, dict[str, Any]]:
    """The verdict for each seed."""
    from rich.console import Console

    from ctllm_jax.cli.quickstart import HELD_OUT, show_verdict
    from ctllm_jax.cli.quickstart_alignment import align
    from ctllm_jax.cli.stages import Stages
    from ctllm_jax.config.load import read_values

    sources = read_values(base / "config.yaml")["data"]["sources"]
    console = Console()
    verdicts = {}
    for seed in seeds:
        name = base.with_name(f"{base.name}-seed{seed}")
        verdicts[seed] = align(base, Path(sources["zh"]["path"]).parent, Stages(name, console), console,
                               name=name, seed=seed, held_out=HELD_OUT).verdict
        console.rule(f"seed {seed}")
        show_verdict(verdicts[seed], console)
    return verdicts


def summarize(verdicts: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Tables: each figure over the seeds, and the shares of each seed with their intervals."""
    from ctllm_jax.report.sentiment import share

    first = next(iter(verdicts.values()))
    models = list(first["figures"])
    figures = {model: {"positive": [each["figures"][model]["positive"]["share"] for each in verdicts.values()],
                       **{name: [each["figures"][model][name] for each in verdicts.values()] for name in FIGURES}}
               for model in models}
    by_seed = {model: {f"seed {seed}": share(each["figures"][model]["positive"]) for seed, each in verdicts.items()}
               for model in models}
    pairs = {f"seed {seed}": share(each["held_out_pairs"]) for seed, each in verdicts.items()}
    calibration = {f"{name.replace('_', ' ')}": share(value) for name, value in first["calibration"].items()}
    return {"sections": {f"over {len(verdicts)} seeds": figures, "judged positive": by_seed,
                         "higher reward on the positive of a held-out pair": {"dpo": pairs},
                         "the judge on held-out reviews: agreement, and what it calls positive of each label":
                             {first["judge"]: calibration}}}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart"), help="a run of the quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sentiment.json")
    arguments = parser.parse_args()
    if not (arguments.base / "config.yaml").exists():
        parser.error(f"{arguments.base} is no run: python launch.py quickstart makes runs/quickstart")
    verdicts = measure(arguments.base, arguments.seeds)
    result = {**summarize(verdicts), "figures": {
        "reviews_of_each_model": next(iter(verdicts.values()))["made_of"]["samples"], "seeds": len(verdicts)},
        "device": cpu_name(), "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "benchmarks/sentiment.py", *sys.argv[1:]])}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
