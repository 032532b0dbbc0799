"""`launch.py sft CONFIG [key=value …]`: a pretrained model learns to answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ctllm_jax.cli.pretrain import train, with_run_dir
from ctllm_jax.cli.processes import join, run_in_processes
from ctllm_jax.config.sft import SFTConfig

if TYPE_CHECKING:
    from ctllm_jax.cli import Context

SCHEMA = SFTConfig
TAKES_CONFIG = True
TRAINS = True
EXAMPLE = "configs/quickstart/sft.yaml"
USAGE = """
usage: python launch.py sft CONFIG init=MODEL data=FILE [key=value …] [--dry-run | --print-config]

Dialogues (ShareGPT, Alpaca, messages, prompt/completion; JSONL, JSON, Parquet) are packed into rows, each a segment of
its own; only answers are learned. MODEL is a run directory, or RUN@STEP; its architecture and tokenizer are taken over.
The same command goes on where the run stopped:
  python launch.py sft configs/quickstart/sft.yaml init=runs/quickstart data=dialogues.jsonl run.dir=runs/chat
  python launch.py sft configs/ct_llm_2b/sft_2_1.yaml init=runs/ct_llm_2b --dry-run
"""


def run(context: Context) -> int:
    """Tune, or with --dry-run say what the data comes to."""
    if (status := run_in_processes(context)) is not None:
        return status
    config = with_run_dir(context.config, context.targets[0])
    join(config, command="sft")
    from ctllm_jax.cluster.agreement import open_same
    from ctllm_jax.training.checkpoints.fingerprint import describe_data
    from ctllm_jax.training.sft import open_tuning
    from ctllm_jax.training.supervision.lock import own
    from ctllm_jax.training.supervision.signals import Signals

    with Signals() as signals, own(config.run, what="sft", free=context.dry_run):
        tuning = open_same(lambda: open_tuning(config), lambda found: describe_data(found.data), what="data")
        show_data(tuning.data.report, context.console)
        if context.dry_run:
            print_plan(tuning, context.console)
            return 0
        train(tuning.config, context.console, name="sft", data=tuning.data, meta=tuning.meta, signals=signals,
              began=context.began)
    return 0


def show_data(report: dict[str, Any], console: Any) -> None:
    """What was read of each source, what was left out and why, and what it comes to by group."""
    from rich import box
    from rich.table import Table

    table = Table("source", "group", "layout", "read", "left out", "dialogues", "tokens", "learned",
                  box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name, source in report["sources"].items():
        reasons = {**source["dropped"], **{reason: source[reason] for reason in
                                           ("over_length", "nothing_learned", "not_drawn")}}
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
        table.add_row(name, source["group"], ", ".join(source["layouts"]), f"{source['read']:,}", left_out or "–",
                      f"{source['rows']:,}", f"{source['tokens']:,}", f"{source['learned_tokens']:,}")
    console.print(table)
    if report["ratio"] or len(report["groups"]) > 1:
        parts = (f"{group}: {found['rows']:,} dialogues, {found['tokens']:,} tokens"
                 for group, found in report["groups"].items())
        console.print(f"ratio {report['ratio'] or 'as it is'}: " + "; ".join(parts))
    console.print(f"{report['rows_per_epoch']:,} rows, {report['filled']:.1%} full; {report['steps_per_epoch']:,} "
                  f"steps an epoch; {report['held_out']:,} dialogues held out")


def print_plan(tuning: Any, console: Any) -> None:
    """What the run would take."""
    from pathlib import Path

    import jax
    from rich.markup import escape

    from ctllm_jax.preflight import plan
    from ctllm_jax.training.console import print_rows

    config, data = tuning.config, tuning.data
    devices = jax.devices()
    kind = None if devices[0].platform == "cpu" else devices[0].device_kind
    rows, warnings = plan.describe(config, directory=Path(config.run.dir), epochs=data.epochs(config.steps),
                                   tokens_per_source=data.tokens_per_source(config.steps), device_kind=kind,
                                   devices=len(devices))
    print_rows(console, rows, title=f"plan of {config.run.dir} (nothing was started)")
    for warning in warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
