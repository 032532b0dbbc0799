"""Exit statuses of every command: what a shell, SLURM or Kubernetes does next is decided by them."""

DONE = 0
"""Finished, or ended on request by a file STOP in the run directory."""
FAILED = 1
"""An error; the same command may get further."""
WRONG_INPUT = 2
"""Config, data or command line are wrong: the same command fails again, and must not be started again by a machine."""
DIVERGED = 3
"""Training broke down again after every rollback: the same command would do the same, and must not be started again."""
REQUEUE = 75
"""Preempted (SIGTERM, SIGUSR1) with a checkpoint saved, or hung, or lost a process: the same command continues
(EX_TEMPFAIL of sysexits.h)."""
INTERRUPTED = 130
"""Ctrl-C; a training run is kept at the step it reached."""
