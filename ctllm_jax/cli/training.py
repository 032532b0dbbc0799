"""What the commands of all training stages share: processes, the dry run, and the trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ctllm_jax.cli.processes import run_in_processes
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pretrain import PretrainConfig, default_run_dir
from ctllm_jax.config.stages import stage_of
from ctllm_jax.storage import open_path

if TYPE_CHECKING:
    from ctllm_jax.cli import Context


def run(context: Context) -> int:
    """Train, or with --dry-run print what that would take."""
    config = with_run_dir(context.config, context.targets[0])
    if context.dry_run:
        return dry_run(config, context.console)
    if (status := run_in_processes(context)) is not None:
        return status
    from ctllm_jax.trainer import train

    train(config, console=context.console, began=context.began)
    return 0


def with_run_dir(config: PretrainConfig, target: str) -> PretrainConfig:
    """The config with a run directory: its own, or runs/ and the config's name."""
    if config.run.dir:
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": default_run_dir(target)})})


def dry_run(config: PretrainConfig, console: Any) -> int:
    """Print what a run will take. A stage whose config alone decides the steps can do without its data."""
    import jax
    from rich.markup import escape

    from ctllm_jax.evaluation.in_loop import open_loop_tasks
    from ctllm_jax.preflight import plan
    from ctllm_jax.training.console import print_rows
    from ctllm_jax.training.joins import Mismatch, checked_start

    stage = stage_of(config)
    open_loop_tasks(config)
    warnings, epochs, tokens = [], None, None
    try:
        config, data, *_ = stage.open(config)
    except UserError as error:
        if isinstance(error, Mismatch) or not stage.plans_without_data:
            raise
        checked_start(config, None)
        warnings.append(f"epochs per source are not known: {error}")
    else:
        epochs, tokens = data.epochs(config.steps), data.tokens_per_source(config.steps)
        stage.print_data(data, console)
    devices = jax.devices()
    kind = None if devices[0].platform == "cpu" else devices[0].device_kind
    rows, more = plan.describe(config, directory=open_path(config.run.dir), epochs=epochs, tokens_per_source=tokens,
                               device_kind=kind, devices=len(devices))
    print_rows(console, rows, title=f"plan of {config.run.dir} (nothing was started)")
    for warning in warnings + more:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    return 0
