"""An sbatch script for a training command."""
from ctllm_jax.config.job import TrainingCommand
from ctllm_jax.config.job_slurm import SlurmJobConfig


def render(job: SlurmJobConfig, command: TrainingCommand) -> str:
    """The script."""
    return "#!/bin/bash\n"


def next_step(path: str) -> str:
    """What to type when the job lies in a file."""
    return f"sbatch {path}"
