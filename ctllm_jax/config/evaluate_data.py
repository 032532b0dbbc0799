"""Questions for `launch.py evaluate`: suites of benchmarks (a YAML file), and `evaluate list` and `evaluate fetch`."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from ctllm_jax.config.base import Section, key
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.load import load


class BenchmarkConfig(Section):
    """One benchmark of a suite. A bare value is its task."""

    shorthand = "task"

    task: str | None = key(None, "task or group of lm-eval or of this package; null: there is none, and absent gives the reason")
    shots: int | None = key(None, "examples before each question; null: the task's own number", ge=0)
    metric: str = key("acc,none", "reported metric, by lm-eval's name: METRIC,FILTER")
    absent: str | None = key(None, "reason why there is no task", prose=True)

    @model_validator(mode="after")
    def _check(self):
        if (self.task is None) == (self.absent is None):
            raise ValueError("needs either task, or absent with the reason why there is none")
        return self


class SuiteConfig(Section):
    """Benchmarks that are evaluated together (configs/eval)."""

    benchmarks: dict[str, BenchmarkConfig] = key(..., "name in tables -> task, shots, metric", min_length=1)

    @model_validator(mode="after")
    def _check(self):
        tasks = [one.task for one in self.benchmarks.values() if one.task]
        twice = sorted({task for task in tasks if tasks.count(task) > 1})
        if twice:
            raise ValueError(f"benchmarks name {', '.join(twice)} more than once")
        return self

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the order of the file."""
        return [one.task for one in self.benchmarks.values() if one.task]

    @property
    def shots(self) -> dict[str, int]:
        """Number of examples by task, if the suite states one."""
        return {one.task: one.shots for one in self.benchmarks.values() if one.task and one.shots is not None}


def read_suite(path: str | Path) -> SuiteConfig:
    """A suite from its file, or by the name of one that comes with the package (`eval/paper`).

    Raises:
      UserError: there is no such file, or it has errors, each listed with file and line.
    """
    return load(SuiteConfig, target=path)


def choose_names(tasks: list[str], suite: str | None) -> tuple[list[str], SuiteConfig | None]:
    """The requested tasks: the named ones, else those of the suite; and the suite.

    Raises:
      UserError: both are given.
    """
    if suite is None:
        return tasks, None
    if tasks:
        raise UserError(f"tasks={','.join(tasks)} and suite={suite}: give one of them")
    read = read_suite(suite)
    return read.tasks, read


class ListConfig(Section):
    """`launch.py evaluate list`: which questions are on this machine, and how to get the others."""

    tasks: list[str] = key([], "tasks, groups and subjects, with commas; empty: all known ones, or those of the suite")
    suite: str | None = key(None, "suite, such as configs/eval/paper.yaml")
    data: str = key("data/evaluation", "folder of official question files and of datasets")


class FetchConfig(Section):
    """`launch.py evaluate fetch`: download questions with the datasets client into the folder of questions."""

    tasks: list[str] = key([], "tasks, groups and subjects, with commas; empty: those of the suite")
    suite: str | None = key(None, "suite, such as configs/eval/paper.yaml")
    data: str = key("data/evaluation", "folder that the datasets are written to")

    @model_validator(mode="after")
    def _check(self):
        if not self.tasks and self.suite is None:
            raise ValueError("needs tasks=NAME,… or suite=FILE")
        return self
