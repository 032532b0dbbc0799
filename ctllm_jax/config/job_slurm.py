"""`launch.py job slurm`: where and how a job of SLURM runs."""

from __future__ import annotations

import re
import shlex
from typing import Literal

from pydantic import model_validator

from ctllm_jax.config.base import key
from ctllm_jax.config.job import JobConfig


class SlurmJobConfig(JobConfig):
    """Keys of an sbatch script."""

    name: str | None = key(None, "name of the job; null: that of the run directory")
    nodes: int = key(1, "nodes", ge=1)
    gpus_per_node: int = key(8, "GPUs of each node; 0: a job on CPUs, one process a node", ge=0)
    gpu_type: str | None = key(None, "type of the GPUs, as the cluster calls it: h100")
    task_per: Literal["gpu", "node"] = key("gpu", "one process per GPU, or one per node with all its GPUs")
    time: str = key("24:00:00", "time limit: minutes, HH:MM:SS or D-HH:MM:SS")
    notice: int | None = key(None, "seconds before the time limit at which the run saves a step and is requeued; null: two minutes plus the estimated time of saving", ge=30)
    partition: str | None = key(None, "partition")
    account: str | None = key(None, "account that pays")
    qos: str | None = key(None, "quality of service")
    constraint: str | None = key(None, "features that the nodes must have")
    cpus_per_task: int | None = key(None, "CPU cores of each process; null: the cluster's default", ge=1)
    memory: str | None = key(None, "memory of each node, such as 400G; 0: all of it; null: the cluster's default")
    exclusive: bool = key(False, "allow no other job on the nodes")
    sbatch: list[str] = key([], "more options of sbatch, such as --reservation=NAME")
    log: str = key("slurm-%x-%j.log", "log of the job; SLURM makes no directories")
    directory: str | None = key(None, "working directory of the command; null: the directory of the submission")
    setup: list[str] = key([], "shell commands before the run, such as module load cuda; they are written unchanged")
    venv: str | None = key(None, "virtual environment that is activated")
    container: str | None = key(None, "image that the processes run in; null: none")
    container_runtime: Literal["pyxis", "apptainer"] = key("pyxis", "program that starts the container: srun's plugin, or apptainer")
    mounts: list[str] = key([], "directories mounted into the container: PATH or PATH:INSIDE")
    launcher: str = key("python launch.py", "start of the command: python launch.py in a checkout, ctllm if the package is installed; words without shell syntax: $NAME and ; are not interpreted")

    @model_validator(mode="after")
    def _check(self):
        limit = seconds_of(self.time)
        if self.notice is not None and self.notice >= limit:
            raise ValueError(f"job.notice={self.notice} leaves nothing of job.time={self.time}")
        if self.mounts and self.container is None:
            raise ValueError("job.mounts is only read with job.container")
        for name, texts in (("sbatch", self.sbatch), ("launcher", [self.launcher])):
            for text in texts:
                try:
                    shlex.split(text)
                except ValueError as error:
                    raise ValueError(f"job.{name}: {text}: {error}") from None
        if wrong := [option for option in self.sbatch if not option.startswith("-")]:
            raise ValueError(f"job.sbatch: {wrong[0]} is no option of sbatch; they begin with --")
        return self

    @property
    def tasks_per_node(self) -> int:
        """Processes of each node."""
        return max(1, self.gpus_per_node) if self.task_per == "gpu" else 1


def seconds_of(time: str) -> int:
    """A time limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Raises:
      ValueError: it is not a time limit.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise ValueError(f"job.time={time} needs minutes, HH:MM:SS or D-HH:MM:SS")
    days, *parts = (None if part is None else int(part) for part in match.groups())
    if days is None and parts[2] is None:  # minutes, or minutes and seconds
        parts = [0, *parts[:2]]
    hours, minutes, seconds = (part or 0 for part in parts)
    return (days or 0) * 86_400 + hours * 3600 + minutes * 60 + seconds
