"""Seconds a question of MMLU and CMMLU on CPU: our harness beside lm-eval's own Hugging Face model on the same weights.

    python benchmarks/evaluate_cpu.py MMLU.zip CMMLU.zip [--subjects N] [--limit N] [--model RUN] [--complete]

Five examples before each question, at most 2,048 tokens, float32; some subjects of each, of each so many questions. The
model has random weights (10.1M parameters and a tokenizer of 8,000 pieces that is trained on the questions), or is a
MODEL of ours; lm-eval gets the export of the same one, and of several batch sizes takes the fastest. Both take turns in
one process: what is timed is lm-eval's call of the model, from texts to log-likelihoods. Ours compiles in its first
turn, which is told apart. All log-likelihoods must be equal to 1e-3, or the two did not do the same. --complete then
asks all questions of both, by `launch.py evaluate`, timed from its start to its end. The result is printed and written
to benchmarks/results/. Needs the extras `eval` and `parity`, and a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import io
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from data_loading import cpu_name
from train_step_cpu import SETTINGS, to_transformers

# As a user's shell: one CPU device. Set before jax is imported, which is inside of the functions.
os.environ["JAX_PLATFORMS"] = "cpu"

SHOTS, LENGTH, PIECES = 5, 2048, 8000
BATCH_SIZES = (1, 4, 16)
SUBJECTS = {  # short and long questions, few and many
    "mmlu": ("mmlu_astronomy", "mmlu_high_school_biology", "mmlu_moral_scenarios", "mmlu_professional_law",
             "mmlu_world_religions", "mmlu_abstract_algebra"),
    "cmmlu": ("cmmlu_ancient_chinese", "cmmlu_chinese_history", "cmmlu_college_medicine", "cmmlu_high_school_physics",
              "cmmlu_marketing", "cmmlu_traditional_chinese_medicine"),
}
PACKAGES = ("jax", "jaxlib", "flax", "lm-eval", "torch", "transformers")


def questions_of(path: Path) -> list[str]:
    """The questions and choices of a zip of CSV files, as lines of text."""
    with zipfile.ZipFile(path) as archive:
        files = [archive.read(name).decode() for name in sorted(archive.namelist()) if name.endswith(".csv")]
    return [cell for file in files for row in csv.reader(io.StringIO(file)) for cell in row if cell]


def make_model(folder: Path, archives: Sequence[Path]) -> str:
    """A run with random weights and a tokenizer for these questions."""
    import jax

    from ctllm_jax.cli import main
    from ctllm_jax.config.pretrain import PretrainConfig
    from ctllm_jax.model.decoder import init_params
    from data_prep.train_tokenizer import fit

    lines = [line for path in archives for line in questions_of(path)]
    (folder / "hf").mkdir()
    (folder / "hf" / "tokenizer.model").write_bytes(fit(lines[::4], vocab_size=PIECES, character_coverage=0.999))
    (folder / "hf" / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": False, "add_eos_token": False}))
    shape = {**SETTINGS["model"], "vocab_size": PIECES, "vocab_multiple": 1, "context_length": LENGTH}
    config = PretrainConfig.model_validate({**SETTINGS, "model": shape}).model
    # Larger weights than training starts from, so that choices differ.
    params = jax.tree.map(lambda weight: weight * (4 if weight.ndim > 2 else 1), init_params(config, jax.random.key(0)))
    to_transformers(SimpleNamespace(model=config), jax.device_get(params)).save_pretrained(folder / "hf")
    if main(["import-hf", str(folder / "hf"), f"output={folder / 'run'}"]):
        raise RuntimeError("the model could not be imported")
    return str(folder / "run")


def ask(lm: Any, opened: dict[str, Any], limit: int) -> tuple[float, list[tuple[float, bool]], dict[str, float]]:
    """(seconds that the model was asked, log-likelihoods, accuracies) of tasks."""
    import copy

    import lm_eval

    from ctllm_jax.evaluation.evaluate import quietly

    seconds: list[float] = []
    answer = lm.loglikelihood

    def timed(requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        began = time.perf_counter()
        answers = answer(requests, **options)
        seconds.append(time.perf_counter() - began)
        return answers

    lm.loglikelihood = timed
    try:
        with quietly():
            found = lm_eval.evaluate(lm, task_dict=copy.copy(opened), limit=limit, bootstrap_iters=0)
    finally:
        lm.loglikelihood = answer
    logps = [response[0] for rows in found["samples"].values() for row in rows for response in row["resps"]]
    accuracies = {name: entry["acc,none"] for name, entry in found["results"].items() if "acc,none" in entry}
    return sum(seconds), logps, accuracies


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mmlu", type=Path, help="the official zip of MMLU")
    parser.add_argument("cmmlu", type=Path, help="the official zip of CMMLU")
    parser.add_argument("--subjects", type=int, default=3, help="of each, at most 6")
    parser.add_argument("--limit", type=int, default=40, help="questions of each subject")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each")
    parser.add_argument("--model", help="a run directory or RUN@STEP; default: random weights")
    parser.add_argument("--complete", action="store_true", help="then all questions, by launch.py evaluate")
    parser.add_argument("--output", type=Path, help="default: results/evaluate_cpu.json")
    arguments = parser.parse_args()
    # XLA makes as many threads as the process may use processors.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:arguments.threads])
    import logging

    import torch
    from lm_eval.models.huggingface import HFLM

    from ctllm_jax.cli import main as command
    from ctllm_jax.evaluation.answer_store import AnswerStore
    from ctllm_jax.evaluation.harness import HarnessModel
    from ctllm_jax.evaluation.tasks import open_tasks
    from ctllm_jax.inference.model import load_model

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"sections": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archives = {"mmlu": arguments.mmlu, "cmmlu": arguments.cmmlu}
        for suite, path in archives.items():
            (folder / f"{suite}.zip").symlink_to(path.absolute())
        run = arguments.model or make_model(folder, list(archives.values()))
        if command(["export-hf", run, f"output={folder / 'export'}"]):
            raise RuntimeError("the model could not be exported")
        model = load_model(run)
        ours = HarnessModel(model, max_length=LENGTH)
        theirs = HFLM(str(folder / "export"), device="cpu", dtype="float32", batch_size=1, max_length=LENGTH)
        for suite, subjects in SUBJECTS.items():
            def opened(subjects=subjects[:arguments.subjects]):
                return open_tasks(subjects, data=folder, num_fewshot=SHOTS, cache=folder / "cache")

            tries = {}
            for size in BATCH_SIZES:
                theirs.batch_size_per_gpu = size
                tries[size] = ask(theirs, opened(), max(4, arguments.limit // 8))[0]
            theirs.batch_size_per_gpu = min(tries, key=tries.get)
            walls: dict[str, list[float]] = {"ours": [], "lm-eval": []}
            first, counts = 0.0, None
            for turn in range(arguments.rounds + 1):
                found = {}
                for each, lm in (("ours", ours), ("lm-eval", theirs)):
                    if turn == 0 and lm is theirs:
                        continue
                    before = ours.scorer.counts.copy()
                    ours.store = AnswerStore(None, None)  # nothing is remembered from the turn before
                    seconds, *found[each] = ask(lm, opened(), arguments.limit)
                    if turn:
                        walls[each].append(seconds)
                    else:
                        first, counts = seconds, ours.scorer.counts - before
                if turn:
                    check(*found["ours"], *found["lm-eval"])
            questions = counts["requests"] // 4
            medians = {each: statistics.median(walls[each]) / questions for each in walls}
            ratio = statistics.median(b / a for a, b in zip(walls["ours"], walls["lm-eval"], strict=True))
            print(f"{suite}, {questions} questions of {arguments.subjects} subjects: ours {medians['ours'] * 1e3:.1f} "
                  f"ms a question, lm-eval {medians['lm-eval'] * 1e3:.1f} (batch size {theirs.batch_size_per_gpu}); "
                  f"ratio {ratio:.2f}; our first turn, with what it compiles, {first:.1f} s; a question takes "
                  f"{counts['tokens'] / questions:.0f} tokens of ours, {counts['padded'] / questions:.0f} padded")
            result["sections"][f"{suite}, {questions} questions of {arguments.subjects} subjects"] = {
                "ours": {"seconds_a_question": [wall / questions for wall in walls["ours"]], "times_as_fast": ratio,
                         "first_turn_seconds_a_question": first / questions,
                         "model_tokens_a_question": counts["tokens"] / questions,
                         "padded_tokens_a_question": counts["padded"] / questions},
                "lm-eval": {"seconds_a_question": [wall / questions for wall in walls["lm-eval"]],
                            "batch_size": theirs.batch_size_per_gpu}}
        for suite in archives if arguments.complete else ():
            result["sections"][f"{suite}, all questions"] = {"launch.py evaluate": ask_all(run, suite, folder)}
    import jax

    result |= {
        "name": arguments.model or "random weights", "device": cpu_name(), "threads": arguments.threads,
        "load_average": os.getloadavg()[0], "python": platform.python_version(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "command": shlex.join(["python", "benchmarks/evaluate_cpu.py", "MMLU.zip", "CMMLU.zip", *sys.argv[3:]])}
    output = arguments.output or Path(__file__).parent / "results" / "evaluate_cpu.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {output}")


def ask_all(run: str, suite: str, folder: Path) -> dict[str, float]:
    """Questions, seconds and accuracy of `launch.py evaluate` on a whole suite; the zips lie in `folder`."""
    launch = Path(__file__).parent.parent / "launch.py"
    words = [f"tasks={suite}", f"num_fewshot={SHOTS}", f"max_length={LENGTH}", f"data={folder}",
             f"output={folder / 'all' / suite}"]
    began = time.perf_counter()
    subprocess.run([sys.executable, str(launch), "evaluate", run, *words], check=True)
    seconds = time.perf_counter() - began
    [path] = (folder / "all" / suite).rglob("*.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    questions = sum(counts["effective"] for counts in found["n-samples"].values())
    print(f"{suite}, all {questions:,} questions: {seconds:.0f} s, {seconds / questions * 1e3:.1f} ms a question")
    return {"questions": questions, "wall_seconds": seconds, "questions_per_second": questions / seconds,
            "accuracy": found["results"][suite]["acc,none"]}


def check(logps: list, accuracies: dict, other_logps: list, other_accuracies: dict) -> None:
    """RuntimeError unless both gave the same answers."""
    worst = max(abs(one[0] - other[0]) for one, other in zip(logps, other_logps, strict=True))
    if worst > 1e-3 or any(abs(accuracies[name] - other_accuracies[name]) > 0.02 for name in accuracies):
        raise RuntimeError(f"log-likelihoods differ by {worst:.1e}, accuracies {accuracies} and {other_accuracies}")


if __name__ == "__main__":
    main()
