"""`launch.py report RUN [RUN2 ...]`: a run's numbers as one HTML page, or several runs beside each other."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

from ctllm_jax.config.errors import UserError
from ctllm_jax.report.page import write_report
from ctllm_jax.report.run import read_run

SUMMARY = "one HTML page of a run's numbers, or of several runs beside each other"


def run(context) -> int:
    """Write the page, and print where it is."""
    if not context.targets:
        raise UserError("report needs a run directory: launch.py report RUN [RUN2 ...]")
    directories = [Path(target) for target in context.targets]
    output = Path(context.config.output) if context.config.output else _default(directories)
    if context.dry_run:
        for directory in directories:
            read_run(directory)
        context.console.print(f"would write {escape(str(output))}", highlight=False, soft_wrap=True)
        return 0
    path = write_report(directories, output)
    context.console.print(f"report: {escape(str(path))}", highlight=False, soft_wrap=True)
    return 0


def _default(directories: list[Path]) -> Path:
    return directories[0] / "report.html" if len(directories) == 1 else Path("report.html")
