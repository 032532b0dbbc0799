"""The results of a model on each benchmark, from its evaluation files and its training, with their settings.

Figures are in percent, those of `bits per byte` in bits. Every figure has its `Setting`. Of several figures, a table
shows the `best`, and notes how its setting differs from the suite's. No jax.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.evaluate_data import BenchmarkConfig, SuiteConfig
from ctllm_jax.config.load import read_values
from ctllm_jax.config.stages import stage_of_run
from ctllm_jax.evaluation import results
from ctllm_jax.evaluation.judge.judge import Result, read_judged
from ctllm_jax.evaluation.registry import find_benchmark
from ctllm_jax.report.readable import finite
from ctllm_jax.report.run import METRICS, read_run

BITS = "bits per byte"
BITS_TASK = "bits_per_byte"
SHORT = 2048
"""A model with a shorter context than this loses the beginning of many questions with examples."""
_IN_PERCENT = ("squadv2",)
"""Tasks whose metrics are in percent already; those of others are shares."""


class Setting(NamedTuple):
    """The setting of a figure; figures with equal settings form one curve.

    Attributes:
      shots: number of examples before each question; None if not applicable.
      asked: `100 of 14,042` if not all questions were asked.
      max_length: context length of the model, if it is below `SHORT`.
      in_training: measured by the training loop.
    """

    shots: int | None = None
    asked: str = ""
    chat: bool = False
    system: bool = False
    wording: str = "lm-eval"
    max_length: int | None = None
    in_training: bool = False

    def notes(self, shots: int | None) -> list[str]:
        """Describe the differences from a suite with `shots` examples."""
        noted = []
        if self.shots is not None and shots is not None and self.shots != shots:
            noted.append(f"{_examples(self.shots)}, where the suite has {shots}")
        if self.asked:
            noted.append("not all questions were asked")
        if self.chat:
            noted.append("asked through the chat template")
        if self.system:
            noted.append("with a system prompt")
        if self.wording != "lm-eval":
            noted.append(f"worded as {self.wording} does")
        if self.max_length:
            noted.append(f"the model sees {self.max_length:,} tokens at once: longer questions lost their beginning")
        if self.in_training:
            noted.append("measured in the training loop")
        return noted

    def describe(self) -> str:
        """A name for a curve, `5 examples, 100 of 14,042`."""
        parts = [_examples(self.shots)] if self.shots is not None else []
        parts += [self.asked] if self.asked else []
        parts += [word for word, said in (("chat", self.chat), ("system prompt", self.system),
                                          ("in training", self.in_training)) if said]
        return ", ".join(parts) or "evaluate"


@dataclass(frozen=True)
class Figure:
    """A value, its 95 % interval, the chance level, the number of questions, and its file."""

    value: float
    setting: Setting
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    questions: int | None = None
    metric: str = ""
    date: float = 0.0
    file: str = ""


@dataclass
class Measured:
    """A checkpoint and all its measured figures.

    Attributes:
      kind: base, sft or dpo.
      ratio: ratio of two groups in fine-tuning, as in its config.
      figures: benchmark -> figures of all settings.
      judged: results of `judge`.
    """

    directory: Path
    step: int
    kind: str = "base"
    ratio: str | None = None
    tokens: int | None = None
    figures: dict[str, list[Figure]] = field(default_factory=lambda: defaultdict(list))
    judged: list[Result] = field(default_factory=list)

    def best(self, benchmark: str, suite: SuiteConfig) -> Figure | None:
        """The figure closest to the suite's setting: its examples, no template, all questions; then the newest."""
        wanted = suite.benchmarks.get(benchmark)
        shots = wanted.shots if wanted else None

        def rank(figure: Figure) -> tuple:
            setting = figure.setting
            return (setting.in_training, shots is not None and setting.shots != shots, setting.chat, setting.system,
                    bool(setting.asked), -(figure.questions or 0), -figure.date)

        return min(self.figures.get(benchmark, ()), key=rank, default=None)


def read_measured(target: str, suite: SuiteConfig) -> list[Measured]:
    """The checkpoints of a target with measured figures, oldest first.

    Args:
      target: a run directory, RUN@STEP, or a folder that `evaluate output=` or `judge output=` wrote to.

    Raises:
      UserError: there is no such directory, or a file there is malformed.
    """
    name, at, step = target.rpartition("@")
    wanted = int(step) if at and step.isdigit() else None
    directory = Path(name if wanted is not None else target)
    if not directory.is_dir():
        raise UserError(f"no results {target}: {directory} is no directory (a run directory, RUN@STEP, or a folder "
                        "that evaluate wrote to)")
    kind, ratio = _kind(directory)
    found: dict[int, Measured] = {}

    def at_step(number: int) -> Measured:
        return found.setdefault(number, Measured(directory, number, kind, ratio))

    for result in _results(directory):
        ours = result[results.OURS]
        measured = at_step(int(ours["checkpoint"]["step"]))
        measured.tokens = ours["checkpoint"].get("tokens") or measured.tokens
        if ours.get("template") and not (directory / "config.yaml").is_file():
            measured.kind = "sft"
        for benchmark, figure in _figures(result, suite):
            measured.figures[benchmark].append(figure)
    for path, number in _judged_files(directory):
        judged = read_judged(path)
        at_step(judged.step or number).judged.append(judged)
    if (directory / METRICS).is_file():
        _add_training(directory, suite, at_step)
    kept = [each for number, each in sorted(found.items()) if wanted in (None, number)]
    if wanted is not None and not kept:
        raise UserError(f"{target}: nothing was measured at step {wanted}"
                        + (f"; there is step {', '.join(map(str, sorted(found)))}" if found else ""))
    return kept


def extra_benchmarks(measured: Sequence[Measured], suite: SuiteConfig) -> list[str]:
    """Measured benchmarks outside the suite, bits per byte last."""
    names = dict.fromkeys(name for each in measured for name in each.figures if name not in suite.benchmarks)
    return sorted(names, key=lambda name: name.startswith(BITS))


def is_bits(benchmark: str) -> bool:
    """Whether a figure is in bits, and lower is better."""
    return benchmark.startswith(BITS)


def _kind(directory: Path) -> tuple[str, str | None]:
    """Kind of training of a run, and its ratio."""
    path = directory / "config.yaml"
    config = read_values(path) if path.is_file() else {}
    name = stage_of_run(config).name
    return ("base" if name == "pretrain" else name), (config.get("data") or {}).get("ratio")


def _results(directory: Path) -> list[dict[str, Any]]:
    return results.read_results(directory) or results.read_folder(directory)


def _judged_files(directory: Path) -> Iterator[tuple[Path, int]]:
    """(file, step) of the records of complete sets."""
    for path in [*sorted((directory / results.FOLDER).glob("*/judge-*.json")), *sorted(directory.glob("judge-*.json"))]:
        if not path.stem.endswith((".part", ".comparison")) and ".part." not in path.name:
            yield path, int(path.parent.name) if path.parent.name.isdigit() else 0


def _figures(result: Mapping[str, Any], suite: SuiteConfig) -> Iterator[tuple[str, Figure]]:
    """(benchmark, figure) of a result: those of the suite, and those requested by other names."""
    known = {}
    for name, benchmark in suite.benchmarks.items():
        if benchmark.task:
            known[benchmark.task] = name
            if figure := _figure(result, benchmark) or _pooled(result, benchmark):
                yield name, figure
    for name, entry in result["results"].items():
        if name.startswith(f"{BITS_TASK}_"):
            yield f"{BITS} · {entry['alias']}", _read(result, name, f"{BITS_TASK},none", scale=1.0)
    for task in result[results.OURS].get("tasks", ()):
        if task not in known and task in result["results"] and (benchmark := find_benchmark(task)):
            metrics = results.metrics_of(result["results"][task])
            chosen = next((metric for metric in metrics if metric.partition(",")[0] == benchmark.metric), None)
            if chosen:
                yield task, _read(result, task, chosen)


def _figure(result: Mapping[str, Any], benchmark: BenchmarkConfig) -> Figure | None:
    entry = result["results"].get(benchmark.task)
    if entry is None or finite(entry.get(benchmark.metric)) is None:
        return None
    return _read(result, benchmark.task, benchmark.metric)


def _read(result: Mapping[str, Any], task: str, metric: str, *, scale: float | None = None) -> Figure:
    entry, ours = result["results"][task], result[results.OURS]
    scale = scale or (1.0 if task in _IN_PERCENT else 100.0)
    interval = ours["intervals"].get(task, {}).get(metric)
    low, high = (None, None) if interval is None else (interval["low"] * scale, interval["high"] * scale)
    guessed = ours["chance"].get(task) if results.is_of_choices(metric) else None
    leaves = _leaves(result, task)
    return Figure(entry[metric] * scale, _setting(result, leaves), low, high,
                  None if guessed is None else guessed * scale, entry.get("sample_len"), metric,
                  float(result.get("date") or 0), result["path"])


def _pooled(result: Mapping[str, Any], benchmark: BenchmarkConfig) -> Figure | None:
    """The figure of a group whose subjects were all evaluated under another name, such as CMMLU's; None if one is
    missing."""
    known = find_benchmark(benchmark.task)
    members, ours = known.members if known else (), result[results.OURS]
    counts = [ours["intervals"].get(member, {}).get(benchmark.metric, {}) for member in members]
    if not members or not all("hits" in each for each in counts):
        return None
    hits, questions = (sum(each[part] for each in counts) for part in ("hits", "count"))
    low, high = results.wilson_interval(hits, questions)
    guessed = [ours["chance"].get(member) for member in members]
    chance = None if None in guessed else sum(
        level * each["count"] for level, each in zip(guessed, counts, strict=True)) / questions * 100
    return Figure(hits / questions * 100, _setting(result, members), low * 100, high * 100, chance, questions,
                  benchmark.metric, float(result.get("date") or 0), result["path"])


def _leaves(result: Mapping[str, Any], name: str) -> list[str]:
    """Tasks below a name; samples are not in the file, so `results.leaves` cannot say."""
    children = result.get("group_subtasks", {}).get(name)
    return [name] if not children else list(dict.fromkeys(leaf for child in children
                                                          for leaf in _leaves(result, child)))


def _setting(result: Mapping[str, Any], leaves: Sequence[str]) -> Setting:
    ours = result[results.OURS]
    shots = {result.get("n-shot", {}).get(leaf) for leaf in leaves}
    asked, there = (sum(result.get("n-samples", {}).get(leaf, {}).get(part, 0) for leaf in leaves)
                    for part in ("effective", "original"))
    length = ours.get("max_length")
    return Setting(
        shots=shots.pop() if len(shots) == 1 else None, asked=f"{asked:,} of {there:,}" if asked < there else "",
        chat=bool(ours.get("template")), system=bool(result.get("system_instruction")),
        wording=ours.get("wording", "lm-eval"), max_length=length if length and length < SHORT and leaves[0] in
        result.get("n-shot", {}) else None)


def _add_training(directory: Path, suite: SuiteConfig, at_step: Any) -> None:
    """Figures of the training loop: benchmarks, and bits per byte of held-out text."""
    run = read_run(directory)
    for record in run.benchmarks:
        measured = at_step(record["step"])
        measured.tokens = measured.tokens or run.tokens_at(record)
        for task, told in record["tasks"].items():
            name = next((name for name, each in suite.benchmarks.items() if each.task == task), task)
            setting = Setting(**{**told["setting"], "in_training": True})
            measured.figures[name].append(Figure(
                told["value"], setting, told["low"], told["high"], told["chance"], told["questions"], told["metric"],
                record["time"], str(directory / METRICS)))
    # Held-out data of SFT and DPO are answers, whose figures are not comparable with a base model's on text.
    for record in run.evaluation if _kind(directory)[0] == "base" else ():
        for source, values in record["sources"].items():
            bits = finite(values.get("bits_per_byte"))
            if bits is not None:
                measured = at_step(record["step"])
                measured.tokens = measured.tokens or run.tokens_at(record)
                measured.figures[f"{BITS} · {source}"].append(
                    Figure(bits, Setting(in_training=True), metric=f"{BITS_TASK},none", date=record["time"],
                           file=str(directory / METRICS)))


def _examples(shots: int) -> str:
    return "1 example" if shots == 1 else f"{shots} examples"


def to_event(result: Mapping[str, Any], asked: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The content of a "benchmarks" event of metrics.jsonl, which `_add_training` reads."""
    told = {}
    for task in asked:
        benchmark = find_benchmark(task)
        metrics = results.metrics_of(result["results"].get(task, {}))
        chosen = next((metric for metric in metrics if metric.partition(",")[0] == benchmark.metric), None)
        if chosen:
            figure = _read({**result, "path": ""}, task, chosen)
            told[task] = {"value": figure.value, "low": figure.low, "high": figure.high, "chance": figure.chance,
                          "questions": figure.questions, "metric": figure.metric,
                          "setting": json.loads(json.dumps(figure.setting._asdict()))}
    return told
