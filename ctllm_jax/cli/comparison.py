"""The tables of a sweep on a terminal: the plan of its runs, and their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ctllm_jax.report.comparison import best_value, figures_of, held_out, trained_on, unequal_held_out, unit
from ctllm_jax.report.readable import compact, visible
from ctllm_jax.report.run import Run

MANY_COLUMNS = 200
_NAME = 18  # columns that a name has at least
_SHORT = {"bits_per_byte": "bpb"}


class Plan(NamedTuple):
    """The plan of a run: its name, its action (starts, goes on, finished), its completed config, tokens
    and epochs of each source, and the report of its data, if it has one."""

    name: str
    now: str
    config: Any
    tokens: dict[str, int]
    epochs: dict[str, float]
    report: dict[str, Any] | None


def print_plans(plans: Sequence[Plan], console: Console) -> None:
    """A row a run: steps, tokens of all steps, and rows and tokens of each group."""
    groups = list(dict.fromkeys(group for plan in plans for group in (plan.report or {}).get("groups", plan.tokens)))
    table = _table("run", "", "steps", "tokens", *_group_heads(groups), "held out", "epochs")
    for plan in plans:
        config = plan.config
        figures = (plan.report or {}).get("groups") or {name: {"tokens": count} for name, count in plan.tokens.items()}
        epochs = max(plan.epochs.values(), default=0)
        table.add_row(_text(plan.name), plan.now, f"{config.steps:,}", compact(sum(plan.tokens.values())),
                      *(_amount(figures.get(group, {})) for group in groups),
                      f"{plan.report['held_out']:,}" if plan.report else "–", f"{epochs:.2f}")
    _print(table, console)
    if any(plan.report for plan in plans):
        counted = "pairs" if "pairs" in next(iter(plans[0].report["groups"].values())) else "dialogues"
        console.print(f"[dim]{', '.join(groups)}: {counted}, and tokens of one epoch[/]")


def print_comparison(runs: Mapping[str, Run], states: Mapping[str, str], console: Console) -> None:
    """A row a run: how it ended, what each group gave it, what it reached on held-out data; the best of each figure
    has a star."""
    known = list(runs.values())
    figures, reached = figures_of(known), {name: held_out(run) for name, run in runs.items()}
    groups = list(dict.fromkeys(group for run in known for group in trained_on(run)))
    best = [best_value(figure, list(reached.values())) for figure in figures]
    table = _table("run", "", "steps", *_group_heads(groups),
                   *(f"{_SHORT.get(figure.key, figure.name)} {visible(figure.group)}".strip() for figure in figures))
    for name, state in states.items():
        run = runs.get(name)
        if run is None:
            table.add_row(_text(name), state, *["–"] * (len(groups) + len(figures) + 1), style="dim")
            continue
        given = trained_on(run)
        cells = [_cell(reached[name].get(figure.group, {}).get(figure.key), figure, top)
                 for figure, top in zip(figures, best, strict=True)]
        table.add_row(_text(name), Text(state, style="" if state == "done" else "yellow"), f"{run.step:,}",
                      *(_amount(given.get(group, {})) for group in groups), *cells)
    _print(table, console)
    notes = [f"{', '.join(map(visible, groups))}: {unit(known)}, and tokens of one epoch"] if any(
        "rows" in each for run in known for each in trained_on(run).values()) else []
    notes += ["figures: held out, * the best"] if figures else ["nothing was held out, or evaluated (evaluation.every)"]
    console.print(Text("; ".join(notes), style="dim"))
    if unequal := unequal_held_out(known):
        console.print(Text("not all runs were evaluated on the same held-out data of"
                           f" {', '.join(map(visible, unequal))}: these figures are not comparable", style="yellow"))


def _group_heads(groups: Sequence[str]) -> list[str]:
    return [visible(group) for group in groups]


def _amount(figures: Mapping[str, float]) -> str:
    """Rows and tokens of a group."""
    tokens = compact(figures["tokens"]) if "tokens" in figures else "–"
    rows = figures.get("rows", figures.get("pairs"))
    return tokens if rows is None else f"{rows:,.0f}, {tokens}"


def _cell(value: float | None, figure: Any, best: float | None) -> Text:
    if value is None:
        return Text("–")
    return Text(f"{figure.spell(value)}*", style="bold green") if value == best else Text(f"{figure.spell(value)} ")


def _text(name: str) -> Text:
    return Text(visible(name), overflow="fold")


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for index, head in enumerate(heads):
        table.add_column(Text(head), justify="left" if index < 2 else "right", overflow="fold",
                         min_width=_NAME if index == 0 else None)
    return table


def _print(table: Table, console: Console) -> None:
    """In a log, a table is as wide as it must be."""
    if not console.is_terminal:
        console = Console(file=console.file, width=MANY_COLUMNS, highlight=False)
    console.print(table)
