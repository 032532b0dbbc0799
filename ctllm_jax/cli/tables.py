"""`launch.py tables RUN…`: results of runs next to the paper's figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.tables import TablesConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from ctllm_jax.cli import Context
    from ctllm_jax.evaluation.tables import Table

SCHEMA = TablesConfig
USAGE = """
usage: python launch.py tables RUN [RUN2 …] [output=FILE] [key=value …]

The tables of CT-LLM's paper, with its figures and those of your runs: base models, aligned models, CHC-Bench, and of a
run whose checkpoints were evaluated the course of its training. A RUN is a run directory (its newest step that was
evaluated), RUN@STEP, or a folder that evaluate or judge wrote to with output=:
  python launch.py tables runs/ct_llm
  python launch.py tables runs/ct_llm runs/sft runs/dpo output=tables.md
  python launch.py tables runs/ct_llm rows=measured format=csv
"""


def run(context: Context) -> int:
    """Read the results, and write the tables."""
    if not context.targets:
        raise UserError("tables needs a run directory: launch.py tables RUN [RUN2 …]")
    from ctllm_jax.config.evaluate_data import read_suite
    from ctllm_jax.evaluation.figures import read_measured
    from ctllm_jax.evaluation.tables import make_tables

    config, suite = context.config, read_suite(context.config.suite)
    measured = [read_measured(target, suite) for target in context.targets]
    for target, found in zip(context.targets, measured, strict=True):
        if not found:
            raise UserError(f"{target}: nothing was measured yet: python launch.py evaluate {target} "
                            f"suite={config.suite}")
    tables = make_tables(measured, suite, peers=config.peers, every_row=config.rows == "all")
    if context.dry_run:
        for table in tables:
            context.console.print(f"{table.title}: {len(table.rows)} rows, {len(table.columns)} columns", markup=False)
        return 0
    if config.output is None:
        _print(context.console, tables, config.written_as)
    else:
        path = Path(config.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_text(tables, config.written_as), encoding="utf-8")
        context.console.print(f"tables: {path}", markup=False, soft_wrap=True)
    return 0


def _print(console: Console, tables: Sequence[Table], written_as: str) -> None:
    if written_as != "text":
        print(_text(tables, written_as), end="")
        return
    from rich.text import Text

    from ctllm_jax.evaluation.tables import foot_lines, to_rich

    if not console.is_terminal:
        # A pipe has no width, and wrapped lines would hinder searching and comparing.
        console.width = 10_000
    for table in tables:
        console.print(to_rich(table))
        for line in foot_lines(table):
            console.print(Text(line, style="dim"))
        console.print()


def _text(tables: Sequence[Table], written_as: str) -> str:
    from ctllm_jax.evaluation.tables import to_csv, to_markdown

    if written_as == "markdown":
        return to_markdown(tables)
    if written_as == "csv":
        return to_csv(tables)
    from rich.console import Console

    console = Console(file=None, width=10_000, record=True, quiet=False)
    with console.capture() as captured:
        _print(console, tables, "text")
    return captured.get()
