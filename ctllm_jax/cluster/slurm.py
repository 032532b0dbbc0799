"""A training command as an sbatch script.

Common mistakes of such scripts, and how this one avoids them:

- a task a GPU by --ntasks-per-node and --gres, not by --gpus-per-task, which hides a node's GPUs from each other;
- with one task per node, the task has all GPUs: `distributed` configures JAX, which would give it only one;
- SLURM signals the shell before the time limit (--signal=B:), and the shell signals all processes by srun; without B:
  SLURM would signal the tasks, and the shell would not wait for them;
- srun does not end the others when the first one ends with 75 (--kill-on-bad-exit=0), but when they do not follow;
- status 75, and no other, requeues: a wrong config must not come back for ever; nor does what scancel told to end, and
  that is COMPLETING already, which `scontrol requeue` would bring back;
- srun does not inherit --cpus-per-task from sbatch since SLURM 22.05, so it is passed explicitly.
"""

from __future__ import annotations

import math
import re
import shlex
from pathlib import PurePath

from ctllm_jax.cluster.saving import save_seconds
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.job import TrainingCommand
from ctllm_jax.config.job_slurm import SlurmJobConfig, seconds_of
from ctllm_jax.config.statuses import REQUEUE

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
_UNKNOWN_SAVE, _MARGIN, _BYTES_A_SECOND = 480, 120, 0.5e9
"""Seconds for saves of unknown size and for everything else, and what all nodes together surely write. The save that is
under way when the notice comes is finished before the last one begins, so two are counted."""
_WAIT = 120
"""Seconds that srun gives processes whose peer has ended: `distributed.heartbeat_seconds` is 100."""
_END = r"""
# On preemption, this shell signals all processes; they save a step and end with {requeue}.
told=0
trap 'told=1; kill -USR1 "$step" 2>/dev/null' USR1 TERM
{srun} &
step=$!
wait "$step"
status=$?
while [ "$told" = 1 ]; do told=0; wait "$step"; status=$?; done  # a signal ends a wait, too

echo "job $SLURM_JOB_ID ended with status $status at $(date '+%F %T')"
if [ "$status" = {requeue} ]; then
    case "$(scontrol show job --oneliner "$SLURM_JOB_ID")" in
        *JobState=RUNNING*) echo "back into the queue, to continue from the saved step"
                            scontrol requeue "$SLURM_JOB_ID" ;;
        *) echo "cancelled: it does not come back; sbatch continues from the saved step" ;;
    esac
fi
exit "$status"
"""


def render(job: SlurmJobConfig, command: TrainingCommand, *, checkpoint_bytes: int | None = None) -> str:
    """The script.

    Args:
      job: the keys of the job.
      command: the training command.
      checkpoint_bytes: size of a resumable step, for the notice; None: not known.

    Raises:
      UserError: the run starts processes itself, or the time limit is not longer than the notice.
    """
    if command.config.processes != 1:
        raise UserError(f"processes={command.config.processes} is for one machine; srun starts those of a job:"
                        " job.nodes, job.gpus_per_node, job.task_per")
    notice = job.notice or _MARGIN + (_UNKNOWN_SAVE if checkpoint_bytes is None
                                      else 2 * math.ceil(save_seconds(checkpoint_bytes, machines=job.nodes,
                                                                      write=_BYTES_A_SECOND, shared=True)))
    if notice >= seconds_of(job.time):
        raise UserError(f"job.time={job.time} is not longer than the {notice} s that one save may take (job.notice)")
    kept = "" if checkpoint_bytes is None else f" (a checkpoint is {checkpoint_bytes / 1e9:,.1f} GB)"
    per = "GPU" if job.gpus_per_node and job.task_per == "gpu" else "node"
    gpus = f" of {job.gpus_per_node} GPUs" if job.gpus_per_node else ""
    lines = ["#!/bin/bash",
             f"# {command.stage} {shlex.quote(command.config.run.dir)}: {job.nodes} node{'s' * (job.nodes > 1)}{gpus},"
             f" one process a {per}, {job.nodes * job.tasks_per_node} in all",
             f"# It is told {notice} s before its time is over{kept}, and comes back until the run is done.",
             f"# To end it for good: touch {shlex.quote(command.config.run.dir + '/STOP')}, or scancel.",
             *(f"#SBATCH {shlex.join(option)}" for option in _options(job, command, notice)), ""]
    if job.directory is not None:
        lines.append(f"cd {shlex.quote(job.directory)} || exit 1")
    lines += job.setup
    if job.venv is not None:
        lines.append(f"source {shlex.quote(job.venv)}/bin/activate || exit 1")
    if command.config.log.wandb_project is None:
        names = [spelled for name in PROXIES for spelled in (name, name.upper())]
        lines.append(f"unset {' '.join(names)}  # gRPC would send the processes' own traffic there")
    if not job.gpus_per_node:
        lines.append("export JAX_PLATFORMS=cpu")
    lines += ["export PYTHONUNBUFFERED=1 CTLLM_TRACEBACK=1",
              'echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST at'
              """ $(date '+%F %T')\""""]
    return "\n".join(lines) + "\n" + _END.format(requeue=REQUEUE, srun=_srun(job, command))


def next_step(path: str) -> str:
    """Commands to show when the job is written to a file."""
    return f"sbatch {shlex.quote(path)}"


def _options(job: SlurmJobConfig, command: TrainingCommand, notice: int) -> list[list[str]]:
    """The words of each line for sbatch, which reads quotes as a shell does."""
    name = job.name or PurePath(command.config.run.dir).name
    gpus = f"gpu:{job.gpu_type + ':' if job.gpu_type else ''}{job.gpus_per_node}"
    given = {"job-name": re.sub(r"[^\w.+-]", "_", name), "nodes": job.nodes, "ntasks-per-node": job.tasks_per_node,
             "gres": gpus if job.gpus_per_node else None,
             "cpus-per-task": job.cpus_per_task, "mem": job.memory, "time": job.time, "partition": job.partition,
             "account": job.account, "qos": job.qos, "constraint": job.constraint, "output": job.log,
             "signal": f"B:USR1@{notice}"}
    words = [f"--{option}={value}" for option, value in given.items() if value is not None]
    words += ["--open-mode=append", "--requeue", *["--exclusive"] * job.exclusive]
    return [*([word] for word in words), *(shlex.split(option) for option in job.sbatch)]


def _srun(job: SlurmJobConfig, command: TrainingCommand) -> str:
    """The line that starts the processes."""
    words = ["srun", "--kill-on-bad-exit=0", f"--wait={_WAIT}", "--label"]
    if job.cpus_per_task is not None:
        words.append(f"--cpus-per-task={job.cpus_per_task}")
    if job.gpus_per_node:
        words.append("--gpu-bind=none")
    if job.container is not None and job.container_runtime == "pyxis":
        words.append(f"--container-image={job.container}")
        if job.mounts:
            words.append(f"--container-mounts={','.join(m if ':' in m else f'{m}:{m}' for m in job.mounts)}")
        here = ['--container-workdir="$PWD"']
    elif job.container is not None:
        binds = [word for mount in job.mounts for word in ("--bind", mount)]
        words += ["apptainer", "exec", *["--nv"] * bool(job.gpus_per_node), *binds, job.container]
        here = []
    else:
        here = []
    return " ".join([shlex.join(words), *here, shlex.join(shlex.split(job.launcher)), shlex.join(command.words)])
