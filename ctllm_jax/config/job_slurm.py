"""`launch.py job slurm`: where and how a job of SLURM runs."""

from __future__ import annotations

from typing import Literal

from ctllm_jax.config.base import key
from ctllm_jax.config.job import JobConfig


class SlurmJobConfig(JobConfig):
    """Keys of an sbatch script."""

    name: str | None = key(None, "name of the job; null: the run directory's")
    nodes: int = key(1, "nodes", ge=1)
    gpus_per_node: int = key(8, "GPUs of each node; 0: a job on CPUs", ge=0)
    task_per: Literal["gpu", "node"] = key("gpu", "one process for each GPU (faster hosts), or one for each node, which has all of its GPUs")
