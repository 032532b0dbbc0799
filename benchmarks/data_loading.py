"""How many tokens a second one core reads, mixes and packs: the whole loader, with nobody to train on the batches.

    python benchmarks/data_loading.py [--dataset DIR] [--step-seconds S]

Without --dataset it makes one of random Chinese text, which takes some seconds. Seven sources with CT-LLM's weights
read the same directory. The result is printed and written to benchmarks/results/data_loading.json; tokens a CPU second
hold on a machine that others use too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WEIGHTS = {"zh_cc": 56.75, "zh_books": 4.77, "zh_papers": 2.82, "zh_others": 2.45, "zh_encyclopedia": 0.20,
           "en": 25.10, "code": 7.91}
PACKAGES = ("array-record", "grain", "numpy", "tensorflow-datasets")


def make_dataset(directory: Path, *, megabytes: int) -> Path:
    """A dataset of random Chinese characters by Zipf's law, in documents of some 600 characters."""
    from ctllm_jax.config.data import BuildConfig
    from ctllm_jax.data.tokenizer import load_tokenizer
    from ctllm_jax.dataset.build import build_from_files
    from data_prep.train_tokenizer import fit

    draw = np.random.default_rng(0)
    alphabet = np.array([chr(0x4E00 + index) for index in range(3000)])
    shares = 1 / np.arange(1, len(alphabet) + 1)
    with open(directory / "text.jsonl", "w", encoding="utf-8") as file:
        written = 0
        while written < megabytes * 1e6:
            characters = draw.choice(alphabet, size=int(draw.lognormal(6.4, 1.0)) + 1, p=shares / shares.sum())
            text = "".join(characters)
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += 3 * len(text)
            if written < 1e6:
                with open(directory / "sample.txt", "a", encoding="utf-8") as sample:
                    sample.write(text[:200] + "\n")
    lines = (directory / "sample.txt").read_text(encoding="utf-8").splitlines()
    (directory / "tokenizer.model").write_bytes(fit(lines, vocab_size=8000, character_coverage=1.0))
    tokenizer = directory / "tokenizer.model"
    build_from_files(BuildConfig(input=[str(directory / "text.jsonl")], output=str(directory / "dataset"), shards=4,
                                 tokenizer=str(tokenizer)), load_tokenizer(tokenizer))
    return directory / "dataset"


def measure(dataset: Path, *, sequence_length: int, rows: int, repeats: int, batches: int) -> dict[str, object]:
    """Medians over `repeats` runs from different steps: tokens a second, tokens a CPU second, seconds to a batch."""
    from ctllm_jax.config.data import DataConfig
    from ctllm_jax.data.pretrain import open_training_data
    from ctllm_jax.dataset.reader import Dataset

    config = DataConfig(sources={name: {"path": str(dataset), "weight": weight} for name, weight in WEIGHTS.items()},
                        threads=1)
    data = open_training_data(config, sequence_length=sequence_length, rows=rows, seed=0,
                              vocab_size=Dataset(dataset).manifest.id_count)
    rates, cpu_rates, first = [], [], []
    tokens = batches * rows * sequence_length
    for repeat in range(repeats):
        started = time.perf_counter()
        iterator = data.iterate(repeat * 10**6, local_rows=range(rows))
        next(iterator)
        first.append(time.perf_counter() - started)
        # What was made ahead before the clock starts must not count.
        for _ in range(2 * config.prefetch):
            next(iterator)
        started, cpu_started = time.perf_counter(), time.process_time()
        for _ in range(batches):
            next(iterator)
        rates.append(tokens / (time.perf_counter() - started))
        cpu_rates.append(tokens / (time.process_time() - cpu_started))
        iterator.close()
    return {"tokens_per_second": statistics.median(rates), "tokens_per_cpu_second": statistics.median(cpu_rates),
            "tokens_per_second_all": rates, "first_batch_seconds": statistics.median(first)}


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, help="a dataset directory; without it one is made")
    parser.add_argument("--megabytes", type=int, default=20, help="text of the dataset that is made")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch")
    parser.add_argument("--batches", type=int, default=60, help="batches timed in each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--step-seconds", type=float, help="seconds of a training step of this batch, to compare with")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "data_loading.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        dataset = arguments.dataset or make_dataset(Path(scratch), megabytes=arguments.megabytes)
        core = min(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {core})
        result = measure(dataset, sequence_length=arguments.sequence_length, rows=arguments.rows,
                         repeats=arguments.repeats, batches=arguments.batches)
    batch_seconds = arguments.rows * arguments.sequence_length / result["tokens_per_second"]
    if arguments.step_seconds:
        result["share_of_step"] = batch_seconds / arguments.step_seconds
    result |= {"sequence_length": arguments.sequence_length, "rows": arguments.rows, "cores": 1,
               "sources": len(WEIGHTS), "device": cpu_name(), "python": platform.python_version(),
               "load_average": os.getloadavg()[0],
               "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
               "command": shlex.join(["python", "benchmarks/data_loading.py", *sys.argv[1:]])}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    print(f"{result['tokens_per_second'] / 1e6:.2f} M tokens/s on one core "
          f"({result['tokens_per_cpu_second'] / 1e6:.2f} M a CPU second); first batch after "
          f"{result['first_batch_seconds'] * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
