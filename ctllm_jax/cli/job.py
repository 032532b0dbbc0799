"""`launch.py job slurm|gke CONFIG [key=value …] [job.KEY=value …]`: a run as a job of a cluster, to read first."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ctllm_jax.cli.outputs import check_writable
from ctllm_jax.config.job import Job, plan_job, schema_of
from ctllm_jax.config.job_gke import GKEJobConfig
from ctllm_jax.config.job_slurm import SlurmJobConfig
from ctllm_jax.config.load import to_yaml as section_to_yaml
from ctllm_jax.config.pretrain import PretrainConfig

if TYPE_CHECKING:
    from ctllm_jax.cli import Context

ACTIONS = {"slurm": schema_of(SlurmJobConfig), "gke": schema_of(GKEJobConfig)}
USAGE = """
usage: python launch.py job slurm|gke CONFIG [key=value …] [job.KEY=value …] [--print-config]

Writes the job of a training run for a person to read, and starts nothing. Keys below `job.` are the job's; all others
are the run's, and are checked here and now as the stage itself would check them (job.stage: pretrain, sft or dpo):
  python launch.py job slurm configs/small/150m.yaml data=DIR steps=2000 job.nodes=2 job.output=150m.sbatch
  python launch.py job gke CONFIG run.dir=gs://BUCKET/runs/2b job.topology=v5p-256 job.site=FILE job.output=2b.yaml
What is the same for all jobs of a cluster may stand in a file (job.site=FILE), below `job:`.
"""


def configure(action: str, words: Sequence[str], overrides: Sequence[str]) -> Job:
    """The job, checked; called before `run`."""
    return plan_job(ACTIONS[action], words, overrides)


def run(context: Context) -> int:
    """Print the job, or write it to a file and say what to type next."""
    # Named like their action, and imported for it alone.
    writer = importlib.import_module(f"ctllm_jax.cluster.{context.action}")
    job, command = context.config.job, context.config.command
    text = writer.render(job, command, checkpoint_bytes=checkpoint_bytes(command.config))
    if job.output is None:
        print(text, end="")
        return 0
    path = Path(job.output)
    check_writable(path, f"job.output={path}", kind="file")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    context.console.print(f"written to {path}; read it, then: {writer.next_step(str(path))}", markup=False)
    return 0


def checkpoint_bytes(config: PretrainConfig) -> int | None:
    """Size of a resumable step: trained weights and two moments of each, float32. None: the model is that of `init`."""
    if config.model is None:
        return None
    from ctllm_jax.model.lora import count_adapters
    from ctllm_jax.model.parameters import count_parameters

    return 12 * (count_parameters(config.model) if config.lora is None else count_adapters(config.model, config.lora))


def to_yaml(job: Job) -> str:
    """The keys of the job, and the config of its run, as two documents."""
    return f"--- # job\n{section_to_yaml(job.job)}--- # {job.command.stage}\n{section_to_yaml(job.command.config)}"
