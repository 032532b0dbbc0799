"""How `data inspect` prints rows: as colored text, or as a table of ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from rich import box
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ctllm_jax.config.control import visible
from ctllm_jax.config.inspect import InspectConfig
from ctllm_jax.data.batch import Batch
from ctllm_jax.data.tokenizer import Tokenizer

SEGMENT_STYLES = ("cyan", "green", "magenta", "yellow", "blue")
_NO_LOSS = "reverse"


def print_rows(rows, tokenizer: Tokenizer, eod_id: int, config: InspectConfig, console) -> int:
    """(index, row) each, as text or as a table of ids; how many there were."""
    legend = Text("a color a segment; ")
    legend.append("reversed", style=_NO_LOSS)
    console.print(legend.append(": input without loss"))
    shown = 0
    for index, row in rows:
        shown += 1
        console.print(Rule(describe(index, row), align="left", style="dim"))
        limit = config.show_tokens or len(row.tokens)
        console.print(table(row, tokenizer, eod_id, limit) if config.ids else _running_text(row, tokenizer, eod_id,
                                                                                          limit))
    return shown


def describe(index: int, row: Batch) -> str:
    """What a row holds, in numbers."""
    real = int((row.segment_ids > 0).sum())
    padding = f", {len(row.tokens) - real:,} of padding" if real < len(row.tokens) else ""
    segments = int(row.segment_ids.max())
    return (f"row {index:,}: {segments} segment{'s' * (segments > 1)}, {real:,} tokens{padding}, "
            f"{int(row.loss_weights.sum()):,} with loss")


def _running_text(row: Batch, tokenizer: Tokenizer, eod_id: int, limit: int) -> Text:
    text = Text()
    for start, stop in _runs(row, eod_id, min(limit, int((row.segment_ids > 0).sum()))):
        style = SEGMENT_STYLES[int(row.segment_ids[start] - 1) % len(SEGMENT_STYLES)]
        if not row.loss_weights[start]:
            style += f" {_NO_LOSS}"
        text.append(_visible(row.tokens[start:stop], tokenizer, eod_id), style=style)
    hidden = len(row.tokens) - limit
    if hidden > 0:
        text.append(f"\n… {hidden:,} tokens more (show_tokens=0 prints all)", style="dim")
    return text


def _runs(row: Batch, eod_id: int, count: int) -> Iterator[tuple[int, int]]:
    """Stretches of one look: the same segment, loss or not, and each end of a document for itself."""
    looks = [(int(segment), float(weight), int(token) == eod_id) for segment, weight, token in
             zip(row.segment_ids[:count], row.loss_weights[:count], row.tokens[:count], strict=True)]
    start = 0
    for stop in range(1, count + 1):
        if stop == count or looks[stop] != looks[start]:
            yield start, stop
            start = stop


def _visible(ids: np.ndarray, tokenizer: Tokenizer, eod_id: int) -> str:
    """The text of some ids; EOD, line ends and control characters as signs, so that text cannot steer the terminal."""
    if ids[0] == eod_id:
        return "⟨end⟩" * len(ids) + "\n"
    return signs(tokenizer.decode(ids))


def signs(text: str) -> str:
    """A text whose line ends and control characters are signs."""
    return visible(text).replace("\n", "↵\n")


def table(row: Batch, tokenizer: Tokenizer, eod_id: int, limit: int, names: Mapping[int, str] | None = None) -> Table:
    """One token a line; `names` are those of ids that are no text."""
    names = names or {}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in ("place", "id", "text", "target", "loss", "segment", "position"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for place in range(min(limit, len(row.tokens))):
        segment = int(row.segment_ids[place])
        style = SEGMENT_STYLES[(segment - 1) % len(SEGMENT_STYLES)] if segment else "dim"
        look = f"{style} {_NO_LOSS}" if segment and not row.loss_weights[place] else style
        piece = _visible(row.tokens[place:place + 1], tokenizer, eod_id).strip("\n") if segment else "padding"
        if segment and int(row.tokens[place]) in names:
            piece = f"⟨{names[int(row.tokens[place])]}⟩"
        table.add_row(str(place), str(row.tokens[place]), Text(piece.replace(" ", "␣"), style=look),
                      str(row.targets[place]), f"{row.loss_weights[place]:g}", str(segment),
                      str(row.positions[place]), style="" if segment else "dim")
    return table
