"""`launch.py job …`: the training command of a job, checked as the stage itself would check it. No jax.

Keys of the job are below `job.` and come from the command line, or from a file for all jobs of a cluster
(`job.site=FILE`). All other keys belong to the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import create_model

from ctllm_jax.config.base import Section, key, section
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.load import ConfigError, find_config, load
from ctllm_jax.config.pretrain import PretrainConfig, default_run_dir
from ctllm_jax.config.stages import STAGES, StageName

PREFIX = "job."
_SITE = f"{PREFIX}site="
_STAGE = f"{PREFIX}stage="


class JobConfig(Section):
    """Keys of jobs on any kind of cluster."""

    stage: StageName = key("pretrain", "the command that the job runs")
    site: str | None = key(None, "YAML file with keys of `job:` that are the same for all jobs of a cluster; the command line wins")
    output: str | None = key(None, "file that the job is written to; null: it is printed", output="file")


@dataclass(frozen=True)
class TrainingCommand:
    """The command that every process of a job runs.

    Attributes:
      stage: pretrain, sft or dpo.
      target: its CONFIG, as typed.
      overrides: its `key=value`, as typed.
      config: the resolved config; `config.run.dir` is set.
    """

    stage: str
    target: str
    overrides: tuple[str, ...]
    config: PretrainConfig

    @property
    def words(self) -> list[str]:
        """The words after `launch.py`."""
        return [self.stage, self.target, *self.overrides]


@dataclass(frozen=True)
class Job:
    """A job: where it runs (`job`, of the schema of its cluster), and what."""

    job: JobConfig
    command: TrainingCommand


def schema_of(job: type[JobConfig]) -> type[Section]:
    """The keys of a job as they are typed: below `job.`."""
    return create_model(job.__name__, __base__=Section, job=(job, section(job, "where and how the job runs")))


def plan_job(schema: type[Section], words: Sequence[str], overrides: Sequence[str]) -> Job:
    """A job and its training command, both checked.

    Args:
      schema: from `schema_of`.
      words: the CONFIG of the run.
      overrides: `job.KEY=value` of the job, `key=value` of the run.

    Raises:
      UserError: either has errors; all are listed.
    """
    ours = [override for override in overrides if override.startswith(PREFIX)]
    theirs = tuple(override for override in overrides if not override.startswith(PREFIX))
    stage = next((override.removeprefix(_STAGE) for override in reversed(ours) if override.startswith(_STAGE)), None)
    site = next((override.removeprefix(_SITE) for override in reversed(ours) if override.startswith(_SITE)), None)
    job, problems = _load(schema, target=site, overrides=ours)
    if not words:
        raise UserError(f"a job needs the config of its run, such as configs/small/150m.yaml (the stage is {_STAGE}…)")
    if len(words) > 1:
        hint = f"; the stage is {_STAGE}{words[0]}" if words[0] in STAGES else " (a key is written key=value)"
        raise UserError(f"a job runs one config; {' and '.join(words[1:])} is left over{hint}")
    target = words[0]
    find_config(target)
    stage = stage if job is None else job.job.stage
    config, more = _load(STAGES.get(stage, STAGES["pretrain"]).schema, target=target, overrides=theirs)
    if problems or more:
        raise ConfigError([*problems, *more])
    if not config.run.dir:
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": default_run_dir(target)})})
    return Job(job.job, TrainingCommand(job.job.stage, target, theirs, config))


def _load(schema: type[Section], **what: Any) -> tuple[Any, list[str]]:
    """Return (the config or None, its problems)."""
    try:
        return load(schema, **what), []
    except ConfigError as error:
        return None, error.problems
