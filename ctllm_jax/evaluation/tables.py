"""The paper's tables with its figures and ours side by side, one benchmark per row. No jax.

A cell without a figure is `–`: not measured. A figure whose setting differs from the suite's is marked, and a note
describes the setting. `to_markdown`, `to_csv` and `to_rich` write the same tables.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ctllm_jax.config.evaluate_data import SuiteConfig
from ctllm_jax.data.questions import CATEGORIES
from ctllm_jax.evaluation.figures import Figure, Measured, extra_benchmarks, is_bits
from ctllm_jax.evaluation.judge.judge import Result, Score
from ctllm_jax.evaluation.paper import PaperModel, read_paper
from ctllm_jax.report.readable import as_markdown, compact
from ctllm_jax.report.run import labels

if TYPE_CHECKING:
    from rich.table import Table as RichTable

NOTHING = "–"
_MARKS = "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ"
_CHC = tuple(list(CATEGORIES)[:8])
"""Categories of CHC-Bench, in the paper's order; the others are of MT-Bench alone."""
_CSV_HEAD = ("table", "row", "column", "origin", "step", "tokens", "value", "low", "high", "questions", "chance",
             "examples", "metric", "notes", "file")


@dataclass(frozen=True)
class Cell:
    """A figure in a table. `notes` describe differences from the suite; `figure` is its source."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    notes: tuple[str, ...] = ()
    figure: Figure | None = None


@dataclass(frozen=True)
class Column:
    """A model: its name, a second line, and its origin for a CSV file: the paper's, or ours."""

    name: str
    below: str = ""
    origin: str = "ours"
    step: int | None = None
    tokens: float | None = None


@dataclass
class Table:
    """A title, columns of models, and rows of cells; `facts` are text columns after the name of a row."""

    title: str
    columns: list[Column]
    rows: list[tuple[str, list[Cell], list[str]]] = field(default_factory=list)
    facts: tuple[str, ...] = ()
    foot: list[str] = field(default_factory=list)

    def notes(self) -> dict[str, str]:
        """Note -> its mark, in the order of the rows."""
        found = dict.fromkeys(note for _, cells, _ in self.rows for cell in cells for note in cell.notes)
        return {note: _mark(index) for index, note in enumerate(found)}


def make_tables(targets: Sequence[list[Measured]], suite: SuiteConfig, *, peers: bool = False,
                every_row: bool = True) -> list[Table]:
    """The tables for which the targets have results: base models, aligned models, CHC-Bench and other judged sets, and
    the course of training of a target with several checkpoints.

    Args:
      targets: from `read_measured`, a list of checkpoints each.
      peers: also the models that the paper compares CT-LLM with.
      every_row: also benchmarks of the paper that were not measured.
    """
    named = _names([each for each in targets if each])
    newest = [(name, _newest(checkpoints)) for name, checkpoints in named]
    base = [(name, each) for name, each in newest if each.kind == "base" and each.figures]
    aligned = [(name, each) for name, each in newest if each.kind != "base" and each.figures]
    tables = []
    if base:
        tables.append(_compare("Base models", base, _base_models(base, peers=peers), suite, every_row=every_row))
    if aligned:
        models = read_paper().compared("sft", "dpo", peers=peers)
        tables.append(_compare("Aligned models", aligned, models, suite, every_row=every_row))
    tables += _judged([(name, each) for name, checkpoints in named for each in _judged_last(checkpoints)])
    tables += [_course(name, checkpoints, suite, every_row=every_row) for name, checkpoints in named
               if sum(bool(each.figures) for each in checkpoints) > 1]
    return tables


def _newest(checkpoints: Sequence[Measured]) -> Measured:
    """The newest checkpoint that `evaluate` measured; if only the training loop measured, the newest of these."""
    asked = [each for each in checkpoints if any(
        not figure.setting.in_training for figures in each.figures.values() for figure in figures)]
    return (asked or checkpoints)[-1]


def _judged_last(checkpoints: Sequence[Measured]) -> list[Measured]:
    """The newest judged checkpoint for each set of questions and model."""
    def of(result: Result) -> tuple[str, str]:
        return result.name, str(result.record["answerer"].get("name"))

    last = {of(result): each for each in checkpoints for result in each.judged}
    kept = [replace(each, judged=[result for result in each.judged if last[of(result)] is each])
            for each in checkpoints]
    return [each for each in kept if each.judged]


def _names(targets: Sequence[list[Measured]]) -> list[tuple[str, list[Measured]]]:
    directories = list(dict.fromkeys(each[0].directory for each in targets))
    short = dict(zip(directories, labels(directories), strict=True)) if directories else {}
    return [(short[each[0].directory], each) for each in targets]


def _base_models(base: Sequence[tuple[str, Measured]], *, peers: bool) -> list[PaperModel]:
    """The final model, the checkpoints nearest to ours, and with `peers` what the paper compares it with."""
    paper = read_paper()
    near = sorted({paper.nearest(each.tokens) for _, each in base if each.tokens} - {len(paper.tokens) - 1})
    others = [model for model in paper.compared("base", peers=peers) if not model.is_ours]
    return [*others, *(paper.checkpoint(index) for index in near), paper.checkpoint(-1)]


def _compare(title: str, ours: Sequence[tuple[str, Measured]], theirs: Sequence[PaperModel], suite: SuiteConfig, *,
             every_row: bool) -> Table:
    columns = [Column(model.name, "paper", "paper" if model.is_ours else "paper, another model") for model in theirs]
    columns += [_column(name, each) for name, each in ours]
    table = Table(title, columns, facts=("examples", "questions", "chance"), foot=_foot(theirs))
    measured = [each for _, each in ours]
    for name in [*suite.benchmarks, *extra_benchmarks(measured, suite)]:
        found = [each.best(name, suite) for each in measured]
        paper = [model.figures.get(name) for model in theirs]
        if any(found) or (every_row and any(value is not None for value in paper)):
            cells = [Cell(value) for value in paper] + [_cell(figure, name, suite) for figure in found]
            table.rows.append((name, cells, _facts(name, found, suite)))
    return table


def _course(name: str, checkpoints: Sequence[Measured], suite: SuiteConfig, *, every_row: bool) -> Table:
    """A run's checkpoints in the order of tokens, each followed by the paper's nearest one."""
    paper = read_paper()
    shown = [each for each in checkpoints if each.figures]
    of_base = shown[0].kind == "base" and all(each.tokens for each in shown)
    sources: list[Measured | PaperModel] = []
    columns = []
    for index, each in enumerate(shown):
        sources.append(each)
        columns.append(_column(f"step {each.step:,}", each, with_step=False))
        near = paper.nearest(each.tokens) if of_base else None
        following = paper.nearest(shown[index + 1].tokens) if of_base and index + 1 < len(shown) else None
        if near is not None and near != following:
            sources.append(paper.checkpoint(near))
            columns.append(Column(paper.label(near), "paper", "paper", tokens=paper.tokens[near]))
    theirs = [each for each in sources if isinstance(each, PaperModel)]
    table = Table(f"Over training: {name}", columns, facts=("examples", "questions", "chance"), foot=_foot(theirs))
    for benchmark in [*suite.benchmarks, *extra_benchmarks(shown, suite)]:
        found = [each.best(benchmark, suite) for each in shown]
        if any(found) or (every_row and any(benchmark in model.figures for model in theirs)):
            cells = [Cell(each.figures.get(benchmark)) if isinstance(each, PaperModel)
                     else _cell(each.best(benchmark, suite), benchmark, suite) for each in sources]
            table.rows.append((benchmark, cells, _facts(benchmark, found, suite)))
    return table


def _column(name: str, measured: Measured, *, with_step: bool = True) -> Column:
    tokens = [f"{compact(measured.tokens)} tokens"] if measured.tokens else []
    step = [f"step {measured.step:,}"] if with_step else []
    ratio = [measured.ratio] if measured.ratio else []
    return Column(name, ", ".join([*ratio, *step, *tokens]), step=measured.step, tokens=measured.tokens)


def _cell(figure: Figure | None, benchmark: str, suite: SuiteConfig) -> Cell:
    if figure is None:
        return Cell()
    wanted = suite.benchmarks.get(benchmark)
    notes = figure.setting.notes(wanted.shots if wanted else None)
    return Cell(figure.value, figure.low, figure.high, tuple(notes), figure)


def _facts(benchmark: str, found: Sequence[Figure | None], suite: SuiteConfig) -> list[str]:
    """Number of examples and questions, and chance level of our figures; several if they differ."""
    def several(values: Sequence[str | None]) -> str:
        return " / ".join(dict.fromkeys(value for value in values if value)) or NOTHING

    there = [figure for figure in found if figure is not None]
    return [several([None if figure.setting.shots is None else str(figure.setting.shots) for figure in there]),
            several([figure.setting.asked or (None if figure.questions is None else f"{figure.questions:,}")
                     for figure in there]),
            several([None if figure.chance is None else f"{figure.chance:.1f}" for figure in there])]


def _foot(theirs: Sequence[PaperModel]) -> list[str]:
    paper = read_paper()
    foot = [f"In percent, with 95 % intervals in brackets; bits per byte in bits, where less is better. {NOTHING}: not "
            "measured."]
    if theirs:
        foot.append(f"Columns marked paper: {paper.name} ({paper.source}), which does not say with how many examples, "
                    "in which wording and by which metric was measured. Ours are worded as lm-eval words them, and "
                    "C-Eval is its validation split: a difference of some points may be one of wording.")
    return foot


def _judged(newest: Sequence[tuple[str, Measured]]) -> list[Table]:
    """A table of each set of questions; ratings of different judges or prompts have tables of their own."""
    groups: dict[tuple[str, ...], list[tuple[str, Measured, Result]]] = {}
    for name, measured in newest:
        for result in measured.judged:
            key = (result.name, result.questions_sha256, result.judge, result.prompts_sha256)
            groups.setdefault(key, []).append((name, measured, result))
    return [_judged_table(entries) for _, entries in sorted(groups.items())]


def _judged_table(entries: Sequence[tuple[str, Measured, Result]]) -> Table:
    first = entries[0][2]
    is_chc = set(first.categories) <= set(_CHC) and len(first.categories) > 1
    columns = [_column(name, measured) for name, measured, _ in entries]
    title = ("CHC-Bench" if is_chc else "Judged answers") + f": {first.name}, judged by {first.judge}"
    table = Table(title, columns, facts=("questions",))
    counts = first.record["questions"]["categories"]
    for category in _CHC if is_chc else first.categories:
        cells = [_rating(result.categories.get(category)) for *_, result in entries]
        count = counts.get(category, {}).get("count")
        table.rows.append((CATEGORIES.get(category, (category,))[0], cells, [NOTHING if count is None else f"{count}"]))
    table.rows.append(("mean of categories", [_rating(result.macro) for *_, result in entries], [""]))
    table.rows.append(("mean of all", [_rating(result.micro) for *_, result in entries],
                       [str(first.record["questions"]["count"])]))
    table.foot.append(f"Ratings from 1 to 10, with 95 % intervals over questions in brackets. {NOTHING}: no answer was "
                      "rated.")
    if is_chc:
        table.foot.append("The paper's ratings of CHC-Bench are not shown, because no source of them could be read.")
    return table


def _rating(score: Score | None) -> Cell:
    if score is None or score.mean is None:
        return Cell()
    notes = [f"{score.failures:,} answers have no rating"] if score.failures else []
    return Cell(score.mean, *(score.interval or (None, None)), tuple(notes))


def _mark(index: int) -> str:
    return _MARKS[index] if index < len(_MARKS) else f"⁽{index + 1}⁾"


def write_cell(cell: Cell, row: str, marks: dict[str, str]) -> str:
    """`26.15`, `25.3 [21.1, 30.0]ᵃ`, or `–`."""
    if cell.value is None:
        return NOTHING
    if cell.low is None:
        text = f"{cell.value:.3f}" if is_bits(row) else f"{cell.value:.2f}"
    else:
        places = 3 if is_bits(row) else 2 if cell.high - cell.low < 1 else 1
        text = f"{cell.value:.{places}f} [{cell.low:.{places}f}, {cell.high:.{places}f}]"
    return text + "".join(marks[note] for note in cell.notes)


def to_markdown(tables: Sequence[Table]) -> str:
    """The tables as Markdown."""
    parts = []
    for table in tables:
        marks = table.notes()
        heads = ["", *("<br>".join(as_markdown(part) for part in (column.name, column.below) if part)
                       for column in table.columns), *map(as_markdown, table.facts)]
        lines = [f"### {table.title}", "", _line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
        for name, cells, facts in table.rows:
            lines.append(_line([as_markdown(name), *(write_cell(cell, name, marks) for cell in cells),
                                *map(as_markdown, facts)]))
        lines += ["", *(f"- {as_markdown(line)}" for line in foot_lines(table))]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def to_csv(tables: Sequence[Table]) -> str:
    """The tables as CSV: one line per figure, with full precision. Missing figures have no line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_CSV_HEAD)
    for table in tables:
        for name, cells, _ in table.rows:
            for column, cell in zip(table.columns, cells, strict=True):
                if cell.value is None:
                    continue
                figure = cell.figure
                of_figure = (["", "", "", "", ""] if figure is None else
                             [figure.questions, figure.chance, figure.setting.shots, figure.metric, figure.file])
                questions, chance, shots, metric, file = of_figure
                writer.writerow([table.title, name, column.name, column.origin, column.step,
                                 None if column.tokens is None else trimmed_number(column.tokens), cell.value, cell.low,
                                 cell.high, questions, chance, shots, metric, "; ".join(cell.notes), file])
    return out.getvalue()


def trimmed_number(value: float) -> str:
    """A whole number without its point."""
    return str(int(value)) if value == int(value) else str(value)


def to_rich(table: Table) -> RichTable:
    """The table for a terminal; its foot is `foot_lines`."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    marks = table.notes()
    shown = RichTable(title=Text(table.title), box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    shown.add_column("")
    for column in table.columns:
        shown.add_column(Text("\n".join(part for part in (column.name, column.below) if part)), justify="right")
    for fact in table.facts:
        shown.add_column(fact, justify="right")
    for name, cells, facts in table.rows:
        shown.add_row(*map(Text, [name, *(write_cell(cell, name, marks) for cell in cells), *facts]))
    return shown


def foot_lines(table: Table) -> list[str]:
    """The text below a table: its unit, and the notes of its marks."""
    return [*table.foot, *(f"{mark} {note}" for note, mark in table.notes().items())]
