"""The output of a running run: one live line on a terminal, plain lines elsewhere.

Nothing else in the training package prints. Model-written text is treated as untrusted: control characters are
displayed as symbols, and markup is not interpreted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ctllm_jax.report.readable import compact, duration, percent, visible

_BAR = 24
_SHORTEST_BAR = 6
_KEPT_ON_A_LINE = 400
_ONLY_IF_ANY = ("bad_steps", "spikes")


def print_rows(console: Console, rows: Iterable[tuple[str, str]], *, title: str | None = None) -> None:
    """Two columns, name and value, under an optional title: the banner at a run's start."""
    rows = [(visible(str(name)), visible(str(value))) for name, value in rows]
    if not rows:
        return
    if title:
        _print(console, Text(visible(title), style="bold"))
    if console.is_terminal and not console.is_dumb_terminal:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(Text(name), Text(value))
        console.print(Padding(table, (0, 0, 1, 2)))
        return
    width = max(cell_len(name) for name, _ in rows)
    for name, value in rows:
        _print(console, Text(f"  {name}{' ' * (width - cell_len(name))}  {value}"))


def _print(console: Console, text: Text) -> None:
    """Print one line without wrapping, so that a log can be searched."""
    console.print(text, soft_wrap=True)


class TrainingConsole:
    """Shows the records of a run. As a context manager it holds the live line; without a console it shows nothing."""

    def __init__(self, console: Console | None, *, total_steps: int):
        """
        Args:
          console: the output; None (in processes other than the first) shows nothing.
          total_steps: steps of the whole run.
        """
        self._console = console
        self._total = total_steps
        self._line = _LiveLine(total_steps)
        self._live: Live | None = None
        if console is not None and console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(self._line, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> TrainingConsole:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            last = self._line.record
            self._live.stop()
            self._live = None
            if last is not None:
                _print(self._console, Text(training_line(last, self._total)))

    def train(self, record: dict[str, Any]) -> None:
        """A "train" record: moves the live line, or prints a line."""
        if self._live is not None:
            self._line.record = record
        elif self._console is not None:
            _print(self._console, Text(training_line(record, self._total)))

    def evaluation(self, record: dict[str, Any]) -> None:
        """An "evaluation" record, above the live line."""
        parts = [Text(self._step(record["step"]), style="cyan"), Text(" | held out", style="bold")]
        named = record["sources"].items()
        if "rewards/margins" in record:
            named = [("all", record), *(named if len(named) > 1 else ())]
        for source, values in named:
            parts.append(Text(f" | {visible(source)}: {', '.join(_held_out_figures(values))}"))
        self._show(Text.assemble(*parts))

    def benchmarks(self, record: dict[str, Any]) -> None:
        """A "benchmarks" record, above the live line: each task in percent, its 95 % interval, and the chance level."""
        parts = [Text(self._step(record["step"]), style="cyan"), Text(" | benchmarks", style="bold")]
        for task, told in record["tasks"].items():
            interval = "" if told["low"] is None else f" [{told['low']:.1f}, {told['high']:.1f}]"
            guessing = "" if told["chance"] is None else f", guessing {told['chance']:.1f}"
            parts.append(Text(f" | {visible(task)} {told['value']:.1f}%{interval}{guessing}"))
        parts.append(Text(f" | {duration(record['seconds'])}", style="dim"))
        self._show(Text.assemble(*parts))

    def sample(self, record: dict[str, Any]) -> None:
        """A "sample" record, above the live line: the prompt is marked, line breaks are shown as ↵."""
        prompt = str(record["prompt"])
        text = str(record["text"]).removeprefix(prompt)
        head = Text.assemble(Text(self._step(record["step"]), style="cyan"), Text(" | sample", style="bold"))
        body = Text.assemble(Text(_one_line(prompt), style="bold yellow"), Text(_one_line(text)), overflow="fold")
        if self._live is not None:
            # Chinese has no spaces to break a line at, so below its head the text fills whole lines.
            self._console.print(head)
            self._console.print(Padding(body, (0, 0, 0, 2)))
        else:
            self._show(Text.assemble(head, " | ", body))

    def message(self, text: str) -> None:
        """Any other line."""
        self._show(Text(visible(text)))

    def _step(self, step: int) -> str:
        return f"step {step:0{len(str(self._total))}d}"

    def _show(self, text: Text) -> None:
        if self._console is None:
            return
        if self._live is not None:
            self._console.print(text, overflow="fold")
        else:
            _print(self._console, text)


def _one_line(text: str) -> str:
    shown = visible(text).replace("\n", "↵").replace("\t", " ")
    return shown if len(shown) <= _KEPT_ON_A_LINE else shown[:_KEPT_ON_A_LINE] + "…"


def _held_out_figures(values: dict[str, Any]) -> list[str]:
    """Format the evaluation results of a source."""
    return [f"{name} {write(values[key])}" for name, key, write in (
        ("loss", "loss", _number), ("bpb", "bits_per_byte", _number),
        ("accuracy", "rewards/accuracies", lambda value: "–" if value is None else percent(value)),
        ("margin", "rewards/margins", _number)) if key in values]


def _number(value: float | None, places: int = 3) -> str:
    """Format a value; NaN, infinity, and null (their form in a file) are shown as such."""
    return "nan" if value is None else f"{value:.{places}f}"


def _fields(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Key and text of the fields of a training record, in display order."""
    fields = []
    for key, write in (
        ("loss", lambda value: f"loss {_number(value)}"),
        ("bits_per_byte", lambda value: f"bpb {_number(value)}"),
        ("rewards/accuracies", lambda value: f"accuracy {percent(value)}"),
        ("rewards/margins", lambda value: f"margin {_number(value)}"),
        ("lr", lambda value: f"lr {value:.1e}"),
        ("grad_norm", lambda value: f"gnorm {_number(value, 2)}"),
        ("tokens_per_second", lambda value: f"{compact(value)} tok/s"),
        ("mfu_causal", lambda value: f"mfu {percent(value)} causal"),
        ("data_wait", lambda value: f"data {percent(value)}"),
        ("bad_steps", lambda value: f"bad {value:,}"),
        ("spikes", lambda value: f"spikes {value:,}"),
        ("eta_seconds", lambda value: f"eta {duration(value)}"),
    ):
        if key in record and (record[key] or key not in _ONLY_IF_ANY):
            value = record[key]
            known = value is not None and math.isfinite(value)
            fields.append((key, write(value) if known or key in ("loss", "bits_per_byte", "grad_norm") else f"{key} –"))
    return fields


def training_line(record: dict[str, Any], total_steps: int) -> str:
    """A training record as one line of a log: step 0120/2000 | loss 4.532 | bpb 2.310 | …"""
    step = f"step {record['step']:0{len(str(total_steps))}d}/{total_steps}"
    return " | ".join([step, *(text for _, text in _fields(record))])


class _LiveLine:
    """The live line: always one row. On a narrow terminal, the least important fields are dropped first, then the bar
    shrinks."""

    # Fields that a narrow terminal drops, in this order; step, loss and time left stay.
    _LEAST_FIRST = ("grad_norm", "lr", "mfu_causal", "data_wait", "bits_per_byte", "tokens_per_second")

    def __init__(self, total_steps: int):
        self.record: dict[str, Any] | None = None
        self._total = total_steps
        self._began = time.monotonic()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # The last column stays free, because a terminal may wrap there.
        yield self.fitted(options.max_width - 1)

    def fitted(self, width: int) -> Text:
        """The line in at most `width` cells."""
        if self.record is None:
            waited = duration(time.monotonic() - self._began)
            line = Text(f"waiting for the first steps, {waited}", style="dim")
            line.truncate(width, overflow="ellipsis")
            return line
        step = self.record["step"]
        fields = _fields(self.record)
        left = f"{step:,}/{self._total:,}"
        dropped = iter(self._LEAST_FIRST)
        room = self._room(width, left, fields)
        while room < _SHORTEST_BAR and (key := next(dropped, None)) is not None:
            fields = [field for field in fields if field[0] != key]
            room = self._room(width, left, fields)
        bar = min(_BAR, room) if room >= _SHORTEST_BAR else 0
        line = Text(left, style="bold", end="")
        if bar:
            full = bar if step >= self._total else int(bar * step / max(1, self._total))
            line.append(" ")
            line.append("━" * full, style="green")
            line.append("━" * (bar - full), style="bright_black")
        for key, text in fields:
            line.append("  ")
            line.append(text, style="bold" if key == "loss" else "dim" if key in ("lr", "grad_norm") else "")
        line.truncate(width, overflow="ellipsis")
        return line

    @staticmethod
    def _room(width: int, left: str, fields: Sequence[tuple[str, str]]) -> int:
        return width - len(left) - 1 - sum(2 + cell_len(text) for _, text in fields)
