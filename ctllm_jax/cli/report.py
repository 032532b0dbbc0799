"""`launch.py report RUN [RUN2 ...]`: a run's numbers as one HTML page, or several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from ctllm_jax.cli.sweep import STATE, run_directories
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.report import ReportConfig
from ctllm_jax.evaluation.curves import benchmark_charts
from ctllm_jax.report.page import write_report
from ctllm_jax.report.run import read_run
from ctllm_jax.storage import open_path

if TYPE_CHECKING:
    from ctllm_jax.cli import Context

SCHEMA = ReportConfig
USAGE = """
usage: python launch.py report RUN [RUN2 …] [output=FILE]

RUN is a run directory, of a finished or running run, or the directory of a sweep, which means all its runs:
  python launch.py report runs/quickstart
  python launch.py report runs/quickstart runs/try output=compare.html
"""


def run(context: Context) -> int:
    """Write the page, and print its path."""
    if not context.targets:
        raise UserError("report needs a run directory: launch.py report RUN [RUN2 ...]")
    targets = [open_path(target) for target in context.targets]
    directories = [directory for target in targets for directory in
                   (run_directories(target) if (target / STATE).exists() else [target])]
    if not directories:
        raise UserError(f"{targets[0]}: no run of this sweep has begun")
    output = open_path(context.config.output) if context.config.output else _default(targets)
    if context.dry_run:
        for directory in directories:
            read_run(directory)
        context.console.print(Text(f"would write {output}"), soft_wrap=True)
        return 0
    path = write_report(directories, output, benchmarks=benchmark_charts(directories))
    context.console.print(Text(f"report: {path}"), soft_wrap=True)
    return 0


def _default(targets: list[Path]) -> Path:
    return targets[0] / "report.html" if len(targets) == 1 else Path("report.html")
