"""A run of any stage, from top to bottom."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape

from ctllm_jax.cluster.agreement import join, open_same
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.config.stages import stage_of
from ctllm_jax.evaluation.in_loop import open_loop_tasks
from ctllm_jax.report.terminal import SafeConsole
from ctllm_jax.storage import open_path
from ctllm_jax.trainer.banner import banner_rows, finish, print_goodput, print_parameter_groups
from ctllm_jax.trainer.hooks import make_hooks
from ctllm_jax.trainer.journal import Journal
from ctllm_jax.training.checkpoints.fingerprint import describe_data
from ctllm_jax.training.console import TrainingConsole, print_rows
from ctllm_jax.training.guard import count_skipped
from ctllm_jax.training.metrics import MetricsWriter
from ctllm_jax.training.records import describe_run, make_record
from ctllm_jax.training.run import prepare_run
from ctllm_jax.training.supervision.goodput import Ledger
from ctllm_jax.training.supervision.lock import own
from ctllm_jax.training.supervision.recovery import Diverged, Rollback
from ctllm_jax.training.supervision.requests import Requests
from ctllm_jax.training.supervision.signals import Signals, Stopped
from ctllm_jax.training.supervision.watchdog import Watchdog


def train(config: PretrainConfig, *, console: Console | None = None, began: float | None = None,
          next_command: bool = True) -> dict[str, Any]:
    """Train a stage to its last step; a run directory that holds a checkpoint is continued.

    Args:
      config: of any stage: `PretrainConfig`, `SFTConfig` or `DPOConfig`, with `run.dir`. Its schema names the stage.
      console: what to print on; None: standard output.
      began: when the run began, by `time.perf_counter`; None: now.
      next_command: whether to print the command that uses the result.

    Returns:
      The last evaluation: source -> figures; empty without one.

    Raises:
      UserError: whatever in config, data or checkpoint does not fit.
      Stopped: a signal or a request ended the run before its last step; it is kept, and `code` is the exit status.
      Diverged: steps stay bad after every rollback.
    """
    began = time.perf_counter() if began is None else began
    stage, directory, console = stage_of(config), open_path(config.run.dir), console or SafeConsole(highlight=False)
    join(config, command=stage.name)
    if config.processes not in (1, jax.process_count()):
        raise UserError(f"processes={config.processes}: the command line starts processes; this runs in"
                        f" {jax.process_count()}")
    first, tasks = jax.process_index() == 0, open_loop_tasks(config)

    def progress(text: str) -> None:
        if first:
            console.print(f"[dim]{escape(text)} …[/]")

    ledger, journal, results = Ledger(began=began), Journal(), {}
    with Signals() as signals, own(config.run, what=stage.name), Watchdog(
            config.watchdog, heartbeat_seconds=config.distributed.heartbeat_seconds, directory=directory,
            ledger=ledger, tell=journal.end) as watchdog:
        # Open the data, which fills the gaps of the config.
        opened = open_same(lambda: stage.open(config, directory=directory), lambda found: describe_data(found.data),
                           what="data")
        config = opened.config
        if first:
            stage.print_data(opened.data, console)
        if opened.prepare is not None:
            prepared = opened.prepare(directory, progress, watchdog.beat)
            if first:
                console.print(prepared, markup=False)

        # Make the mesh, restore or initialize the state, compile the step.
        run = prepare_run(opened, directory=directory, stage=progress, ledger=ledger)
        start = describe_run(run)
        if first:
            print_rows(console, banner_rows(run, start), title=f"{stage.name} {directory}")
            print_parameter_groups(run, console)

        # Train, with everything that happens between the steps.
        with (MetricsWriter(directory, tensorboard=config.log.tensorboard, wandb_project=config.log.wandb_project,
                            config=start["config"], steps=config.steps) as writer,
              TrainingConsole(console if first else None, total_steps=config.steps) as shown):
            writer.event("start", **start)
            journal.open(writer, shown, ledger=ledger, make=make_record(run), step=run.start,
                         skipped=count_skipped(run.state), damage=getattr(run.data, "damage", None))
            requests = Requests(directory, signals, tell=journal.request)
            signals.begin(shown.message)

            def listen() -> None:
                run.checkpointer.listen(shown.message, record=lambda text: writer.event("warning", message=text))

            def rolled_back(rollback: Rollback) -> None:
                journal.rolled_back(rollback)
                listen()  # a rollback makes a new checkpointer

            listen()
            try:
                reached = run.train(
                    record=journal.train, stop_due=requests.stop_due, ledger=ledger, dispatched=watchdog.dispatched,
                    rolled_back=rolled_back,
                    hooks=make_hooks(run, writer, shown, results, requests, tasks=tasks, journal=journal,
                                     beat=watchdog.beat))
            except (KeyboardInterrupt, Stopped):
                journal.end(signals.reason or "interrupted")
                raise
            except Diverged as diverged:
                journal.end("diverged", diverged.message)
                raise
            except BaseException as error:
                if isinstance(error, UserError):
                    watchdog.leave(error.status)
                watchdog.await_verdict(error)
                with suppress(OSError):  # of a full disk, say, which may be the error itself
                    journal.end("failed")
                raise
            finally:
                requests.close(journal.step)
            journal.end("done" if reached == config.steps else requests.reason, step=reached)

    # Finish: where the time went, the report, and what to type next.
    if first:
        print_goodput(directory, console)
    if reached < config.steps:
        if first:
            console.print(f"stopped at step {reached:,} of {config.steps:,}, which is kept: the same command goes on")
        raise Stopped(requests.reason)
    if first:
        finish(run, console, next_command=next_command)
    return results
