"""Charts of each benchmark over the tokens of training: our results with intervals, the paper's, and chance.

Figures of one curve have the same setting; each setting has its own curve. No jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ctllm_jax.config.evaluate_data import SuiteConfig, read_suite
from ctllm_jax.evaluation import results
from ctllm_jax.evaluation.figures import Figure, Measured, Setting, extra_benchmarks, is_bits, read_measured
from ctllm_jax.evaluation.paper import read_paper
from ctllm_jax.report.charts import Chart, Level, Series
from ctllm_jax.report.run import METRICS, labels

SUITE = "eval/paper"
_GROUPS = (" humanities", " stem", " social science", " other", " hard", " china-specific")
"""Suffixes of a benchmark's parts, which are in the tables but not on the page."""


def benchmark_charts(run_dirs: Sequence[str | Path], *, suite: str = SUITE) -> list[Chart]:
    """A chart of each benchmark that was measured for one of the runs; none if nothing was measured.

    Raises:
      UserError: a file of results that is malformed.
    """
    directories = [Path(directory) for directory in run_dirs]
    if not any(_has_some(directory) for directory in directories):
        return []
    read = read_suite(suite)
    runs = [read_measured(str(directory), read) for directory in directories]
    names = labels(directories)
    everything = [each for run in runs for each in run]
    charts = []
    for benchmark in [*read.benchmarks, *extra_benchmarks(everything, read)]:
        if benchmark.endswith(_GROUPS):
            continue
        if is_bits(benchmark) and not _was_evaluated(everything, benchmark):
            continue  # The course of training has a chart of it already.
        if any(benchmark in each.figures for each in everything):
            charts.append(_chart(benchmark, runs, names, read))
    return charts


def _has_some(directory: Path) -> bool:
    if any((directory / results.FOLDER).glob("*/*.json")):
        return True
    metrics = directory / METRICS
    if not metrics.is_file():
        return False
    with open(metrics, "rb") as file:
        return any(b'"event": "benchmarks"' in line for line in file)


def _was_evaluated(everything: Sequence[Measured], benchmark: str) -> bool:
    return any(not figure.setting.in_training for each in everything for figure in each.figures.get(benchmark, ()))


def _chart(benchmark: str, runs: Sequence[list[Measured]], names: Sequence[str], suite: SuiteConfig) -> Chart:
    several = len(runs) > 1
    factor = 1.0 if is_bits(benchmark) else 0.01
    series, kinds = [], set()
    for name, checkpoints in zip(names, runs, strict=True):
        for setting, points in _curves(benchmark, checkpoints).items():
            kinds.update(each.kind for each, _ in points)
            label = f"{name} · {setting.describe()}" if several else setting.describe()
            series.append(_series(label, len(series), points, factor))
    levels = [Level("guessing", chance * factor) for chance in _chance(benchmark, runs)]
    if kinds == {"base"} and benchmark in (figures := read_paper().checkpoints):
        paper = read_paper()
        series.append(Series("CT-LLM, paper", 7, range(len(paper.tokens)), paper.tokens,
                             [value * factor for value in figures[benchmark]], dots=True, dashed=True))
    elif kinds and "base" not in kinds:
        levels += [Level(model.name, model.figures[benchmark] * factor, 7)
                   for model in read_paper().compared(*sorted(kinds), peers=False) if benchmark in model.figures]
    note = "bits, less is better" if is_bits(benchmark) else ""
    return Chart(benchmark, series, note=note, levels=levels, kind="plain" if is_bits(benchmark) else "percent",
                 both_scales=True)


def _curves(benchmark: str, checkpoints: Sequence[Measured]) -> dict[Setting, list[tuple[Measured, Figure]]]:
    """Setting -> the newest figure of each checkpoint whose tokens are known, in the order of tokens."""
    found: dict[Setting, dict[int, tuple[Measured, Figure]]] = {}
    for each in sorted((each for each in checkpoints if each.tokens), key=lambda each: each.tokens):
        for figure in sorted(each.figures.get(benchmark, ()), key=lambda figure: figure.date):
            found.setdefault(figure.setting, {})[each.step] = (each, figure)
    return {setting: list(points.values()) for setting, points in found.items()}


def _series(name: str, color: int, points: Sequence[tuple[Measured, Figure]], factor: float) -> Series:
    def scaled(values: Sequence[float | None]) -> list[float | None]:
        return [None if value is None else value * factor for value in values]

    return Series(name, color % 7, [each.step for each, _ in points], [each.tokens for each, _ in points],
                  scaled([figure.value for _, figure in points]), dots=True,
                  low=scaled([figure.low for _, figure in points]), high=scaled([figure.high for _, figure in points]))


def _chance(benchmark: str, runs: Sequence[list[Measured]]) -> list[float]:
    """The chance level; several if different questions were asked."""
    levels = {round(figure.chance, 1) for checkpoints in runs for each in checkpoints
              for figure in each.figures.get(benchmark, ()) if figure.chance is not None}
    return sorted(levels)
