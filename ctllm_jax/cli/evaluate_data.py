"""`launch.py evaluate list` and `evaluate fetch`: which questions are here, and getting the others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.evaluate_data import FetchConfig, ListConfig, choose_names

if TYPE_CHECKING:
    from ctllm_jax.cli import Context


def run_list(context: Context) -> int:
    """A table of tasks; status 1 if any has no questions here."""
    from rich.text import Text

    _refuse_targets(context)
    config: ListConfig = context.config
    names, suite = choose_names(config.tasks, config.suite)
    from ctllm_jax.evaluation.availability import look
    from ctllm_jax.evaluation.registry import BENCHMARKS
    from ctllm_jax.evaluation.tasks import describe_fetch

    names, data, missing = names or list(BENCHMARKS), Path(config.data), []
    width = max(map(len, names))
    for one in look(names, data=data):
        if one.questions is None:
            missing.append(one)
        count = Text(f"{'missing':>9}", "red") if one.questions is None else Text(f"{one.questions:>9,}", "green")
        context.console.print(Text.assemble(f"{one.name:<{width}}", count, f"  {one.note}"))
    for name, benchmark in suite.benchmarks.items() if suite else ():
        if benchmark.absent:
            context.console.print(Text(f"{name}: {benchmark.absent}"))
    context.console.print(Text(f"{len(names) - len(missing)} of {len(names)} have their questions in {data}"))
    if fetchable := [one.name for one in missing if one.on_hub]:
        wanted = f"suite={config.suite}" if suite else f"tasks={','.join(fetchable)}"
        context.console.print(Text(f"of the missing: {describe_fetch(wanted, data=data)}"))
    return 1 if missing else 0


def run_fetch(context: Context) -> int:
    """Fetch missing questions; status 1 if any could not be fetched."""
    from rich.text import Text

    _refuse_targets(context)
    config: FetchConfig = context.config
    names, _ = choose_names(config.tasks, config.suite)
    from ctllm_jax.evaluation.availability import endpoint, fetch

    context.console.print(Text(f"asking {endpoint()} for {', '.join(names)}"))
    failures = 0
    for one in fetch(names, data=Path(config.data)):
        name = one.dataset + (f" ({one.configuration})" if one.configuration else "")
        failures += one.rows is None
        style, word = ("red", "failed ") if one.rows is None else ("green", "good ")
        rows = f"{one.rows:,} rows in " if one.rows else ""
        context.console.print(Text.assemble((word, style), f"{name}: {rows}{one.note}"))
    if failures:
        context.console.print(Text(f"{failures} could not be fetched; python launch.py evaluate list tells which files "
                                   f"can be put into {config.data} by hand"))
    return 1 if failures else 0


def _refuse_targets(context: Context) -> None:
    if context.targets:
        raise UserError(f"evaluate {context.action} takes only keys; {' '.join(context.targets)} is left over "
                        "(tasks=NAME,… names tasks)")
