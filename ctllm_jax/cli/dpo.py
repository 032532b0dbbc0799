"""`launch.py dpo CONFIG [key=value …]`: a model that answers learns which answers are preferred."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ctllm_jax.cli.pretrain import train, with_run_dir
from ctllm_jax.cli.processes import join, run_in_processes
from ctllm_jax.config.dpo import DPOConfig

if TYPE_CHECKING:
    from ctllm_jax.cli import Context

SCHEMA = DPOConfig
TAKES_CONFIG = True
TRAINS = True
EXAMPLE = "configs/quickstart/dpo.yaml"
USAGE = """
usage: python launch.py dpo CONFIG init=MODEL data=FILE [key=value …] [--dry-run | --print-config]

Pairs (TRL, ShareGPT ranking, Alpaca with two outputs, UltraFeedback, HH; JSONL, JSON, Parquet) are packed into rows,
both answers of a pair in one. MODEL was tuned by sft; its architecture, tokenizer and template are taken over, and it
is the reference: its log-probabilities are computed once and kept beside the pairs, for all runs that need the same.
The same command goes on where the run stopped:
  python launch.py dpo configs/quickstart/dpo.yaml init=runs/chat data=pairs.jsonl run.dir=runs/preferred
  python launch.py dpo configs/ct_llm_2b/dpo.yaml init=runs/ct_llm_2b-sft_2_1 --dry-run
"""


def run(context: Context) -> int:
    """Train, or with --dry-run say what the data comes to."""
    from pathlib import Path

    if (status := run_in_processes(context)) is not None:
        return status
    config = with_run_dir(context.config, context.targets[0])
    join(config, command="dpo")
    import jax
    from rich.markup import escape

    from ctllm_jax.cli.sft import print_plan
    from ctllm_jax.cluster.agreement import open_same
    from ctllm_jax.training.checkpoints.fingerprint import describe_data
    from ctllm_jax.training.dpo import needs_reference, open_preferences
    from ctllm_jax.training.reference import attach_reference
    from ctllm_jax.training.supervision.lock import own
    from ctllm_jax.training.supervision.signals import Signals

    console, first = context.console, jax.process_index() == 0
    with Signals() as signals, own(config.run, what="dpo", free=context.dry_run):
        config, data, objective, meta = opened = open_same(
            lambda: open_preferences(config), lambda found: describe_data(found.data), what="data")
        if first:
            show_data(data.report, console)
        if context.dry_run:
            print_plan(opened, console)
            return 0
        if needs_reference(config):
            stage = (lambda text: console.print(f"[dim]{escape(text)} …[/]")) if first else (lambda text: None)
            found = attach_reference(config, data, objective, directory=Path(config.run.dir), stage=stage)
            if first:
                console.print(f"reference: {found['answers']:,} answers, {found['how']}; checked to "
                              f"{found['difference']:.1e} nats a token (at most {found['tolerance']:.1e})")
        train(config, console, name="dpo", data=data, meta=meta, objective=objective, signals=signals,
              began=context.began)
    return 0


def show_data(report: dict[str, Any], console: Any) -> None:
    """What was read of each source, what was left out and why."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("source", "group", "layout", "read", "left out", "cut", "pairs", "tokens", "learned",
                  box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    lines = []
    for name, source in report["sources"].items():
        reasons = {**source["dropped"], "over-length prompt": source["over_length_prompt"],
                   "over-length": source["over_length"], "equal as tokens": source["equal_ids"]}
        if any(reasons.values()):
            left_out = ", ".join(f"{count:,} ({reason})" for reason, count in reasons.items() if count)
            lines.append(f"left out of {name}: {left_out}")
        table.add_row(name, source["group"], ", ".join(source["layouts"]), f"{source['read']:,}",
                      f"{sum(reasons.values()):,}", *(f"{source[figure]:,}" for figure in
                                                      ("cut", "pairs", "tokens", "learned_tokens")))
    console.print(table)
    for line in lines:
        console.print(Text(line))
    console.print(f"{report['rows_per_epoch']:,} rows of at most {report['num_segments'] // 2} pairs, "
                  f"{report['filled']:.1%} full; {report['steps_per_epoch']:,} steps an epoch; "
                  f"{report['held_out']:,} pairs held out")
