"""`data inspect` of dialogues, pairs, and a run's own rows: what is learned, what is not, where a marker stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from ctllm_jax.cli.rows import SEGMENT_STYLES, describe, print_rows, signs, table
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.inspect import InspectConfig, Inspection
from ctllm_jax.config.stages import STAGES
from ctllm_jax.data.batch import Batch

_ROW = {"dialogues": 1024, "pairs": 2048}
_LEARNED, _OTHER = "⟦", "⟧"  # around what is learned, where there is no color
_SEED = 42


class Shown(NamedTuple):
    """A row to print: its number, its [S] arrays, and of each segment where it comes from (empty: not known)."""

    index: int
    row: Batch
    origins: Sequence[str]


def find_kind(path: Path, config: InspectConfig) -> str:
    """What a file holds: `text`, `dialogues` or `pairs`."""
    if config.kind is not None:
        return config.kind
    from ctllm_jax.data import conversations, pairs

    record = conversations.first_record(path) if path.exists() else None
    if record is None:
        return "text"
    return "pairs" if pairs.detect_layout(record) else "dialogues" if conversations.detect_layout(record) else "text"


def inspect_file(path: Path, kind: str, config: InspectConfig, console: Console) -> int:
    """Rows of a file of dialogues or pairs, packed as a run with these keys packs them."""
    from ctllm_jax.config.dpo import PairDataConfig, PairSourceConfig
    from ctllm_jax.config.sft import SFTDataConfig, SFTSourceConfig
    from ctllm_jax.data.preference import PreferenceData
    from ctllm_jax.data.sft import SFTData
    from ctllm_jax.data.templates import open_template
    from ctllm_jax.data.tokenizer import load_tokenizer

    if config.tokenizer is None:
        raise UserError(f"tokenizer must be given: {path} holds {kind}, which are not tokenized yet")
    tokenizer, length = load_tokenizer(config.tokenizer), config.sequence_length or _ROW[kind]
    options = {"tokenizer": tokenizer, "sequence_length": length, "rows": 1, "seed": _SEED, "vocab_size": 2**31}
    named = {"path": str(path), "max_bad": config.max_bad}
    common = {"template": config.template, "over_length": config.over_length}
    try:
        if kind == "dialogues":
            source = SFTDataConfig(sources={"data": SFTSourceConfig(**named)}, loss_on=config.loss_on, **common)
            data = SFTData(source, keep_dialogues=True, **options)
        else:
            source = PairDataConfig(sources={"data": PairSourceConfig(**named)}, **common)
            data = PreferenceData(source, template=open_template(config.template, tokenizer), context_length=length,
                                  keep_pairs=True, **options)
    except UserError as error:
        raise UserError(str(error).removeprefix("data.sources.data: ")) from None
    return _show(data, 1, config, console, stage="sft" if kind == "dialogues" else "dpo", name=str(path))


def inspect_run(inspection: Inspection, console: Console) -> int:
    """The rows of a run, from the first step on, or what it holds out."""
    keys, config = inspection.keys, inspection.run
    data = STAGES[inspection.stage].open(config, keep_texts=True).data
    if hasattr(data, "template"):
        return _show(data, config.batch.rows, keys, console, stage=inspection.stage, name="this run")
    return _show_text(data, config, keys, console)


def _show_text(data: Any, config: Any, keys: InspectConfig, console: Console) -> int:
    from ctllm_jax.data.tokenizer import load_tokenizer

    if data.tokenizer_path is None:
        raise UserError("the data is synthetic: its tokens are random, and have no text")
    rows = ((each.index, each.row) for each in _rows(data, config.batch.rows, keys))
    if not print_rows(rows, load_tokenizer(data.tokenizer_path), data.eod_id, keys, console):
        raise UserError(f"start={keys.start}: fewer rows are held out")
    return 0


def _show(data: Any, rows: int, config: InspectConfig, console: Console, *, stage: str, name: str) -> int:
    """The counts, then rows of dialogues or pairs."""
    from ctllm_jax.data.preference import PreferenceData
    from ctllm_jax.data.tokenizer import load_tokenizer

    of_pairs = isinstance(data, PreferenceData)
    STAGES[stage].print_data(data, console)
    writer = Writer(data.template, colors=console.color_system is not None)
    console.print(writer.legend(of_pairs))
    shown = 0
    for each in _rows(data, rows, config):
        shown += 1
        console.print(Rule(Text(describe(each.index, each.row).replace("with loss", "learned")), align="left",
                           style="dim"))
        if config.ids:
            limit = config.show_tokens or len(each.row.tokens)
            console.print(table(each.row, load_tokenizer(data.tokenizer_path), -1, limit, writer.names))
        else:
            for text in (writer.pairs if of_pairs else writer.dialogues)(each, config.show_tokens):
                console.print(text)
    if not shown:
        raise UserError(f"start={config.start}: {name} has fewer rows")
    return 0


def _rows(data: Any, rows: int, config: InspectConfig) -> Iterator[Shown]:
    """Rows of the first epoch of training in their order, or of what is held out, source after source."""
    wanted = range(config.start, config.start + config.rows)
    if config.split != "train":
        index = 0
        for name, batches in data.held_out(rows=1, split=config.split, max_tokens=2**62).items():
            for batch in batches:
                if index in wanted:
                    part = batch.preference
                    row = Batch(*(array[0] for array in batch[:5]),
                                part and type(part)(*(array[0] for array in part)))
                    yield Shown(index, row, [f"held out of {name}"] * int(row.segment_ids.max()))
                index += 1
                if index >= wanted.stop:
                    return
        return
    for index in wanted:
        step, place = divmod(index, rows)
        batch = next(data.iterate(step, local_rows=[place]))
        row = Batch(*(array[0] for array in batch[:5]))
        if hasattr(data, "items"):
            if step >= data.steps_per_epoch or not row.segment_ids.any():
                continue  # padding at the end of the epoch
            row = data.row(step, place)
        yield Shown(index, row, _origins(data, step, place))


def _origins(data: Any, step: int, place: int) -> list[str]:
    """Where each dialogue or pair of a row comes from, with its roles and the weights that are not 1."""
    if getattr(data, "dialogues", None):
        each = [data.dialogues[item] for item in data.items(step, place)]
        return [f"{one.file}:{one.row}: {', '.join(map(_weighted, one.messages))}" for one in each]
    if getattr(data, "pairs", None):
        return [f"{data.pairs[item].file}:{data.pairs[item].row}" for item in data.items(step, place)]
    return []


def _weighted(message: Any) -> str:
    return message.role if message.weight == 1 else f"{message.role} × {message.weight:g}"


class Writer:
    """Segments as text: learned tokens in color and bold, others dim, markers by name. Without color, learned ones
    stand in brackets."""

    def __init__(self, template: Any, *, colors: bool):
        self.names = template.marker_names()
        self._template, self._colors = template, colors

    def legend(self, of_pairs: bool) -> Text:
        """What the looks mean."""
        learned = Text("learned", style="bold cyan") if self._colors else Text(f"{_LEARNED}learned{_OTHER}")
        tail = "; the prompt, which stands before each answer, once" if of_pairs else ""
        return Text.assemble("a color a segment; " if not of_pairs else "", learned, ", ", ("not learned", "dim"), ", ",
                             ("⟨marker⟩", "reverse"), tail)

    def dialogues(self, shown: Shown, limit: int) -> Iterator[Text]:
        """Each segment under where it comes from, up to `limit` tokens of the row (0: all)."""
        row, left = shown.row, limit or len(shown.row.tokens)
        for segment in range(1, int(row.segment_ids.max()) + 1):
            here = np.flatnonzero(row.segment_ids == segment)
            origin = shown.origins[segment - 1] if shown.origins else ""
            yield Text(signs(f"segment {segment}, {len(here):,} tokens: {origin}".rstrip(": ")), style="dim italic")
            style = SEGMENT_STYLES[(segment - 1) % len(SEGMENT_STYLES)]
            yield self._stretch(row, here[:left], style, more=len(here) - left)
            left = max(0, left - len(here))
            if not left:
                break

    def pairs(self, shown: Shown, limit: int) -> Iterator[Text]:
        """The prompt, the chosen and the rejected answer of each pair, up to `limit` tokens of each (0: all)."""
        row = shown.row
        for pair in range(1, int(row.preference.pair_ids.max()) + 1):
            origin = shown.origins[pair - 1] if shown.origins else ""
            yield Text(signs(f"pair {pair}: {origin}".rstrip(": ")), style="dim italic")
            segments = np.flatnonzero(row.preference.pair_ids == pair)
            for place, side in enumerate(sorted(segments, key=lambda index: not row.preference.is_chosen[index])):
                here = np.flatnonzero(row.segment_ids == side + 1)
                first = int(np.argmax(row.loss_weights[here] > 0)) + 1  # the target of the input before it
                parts = [("chosen" if row.preference.is_chosen[side] else "rejected", here[first:],
                          "green" if row.preference.is_chosen[side] else "red")]
                for name, tokens, style in ([("prompt", here[:first], "cyan")] if place == 0 else []) + parts:
                    left = limit or len(tokens)
                    yield Text.assemble((f"{name}, {len(tokens):,} tokens  ", f"{style} italic"),
                                        self._stretch(row, tokens[:left], style, more=len(tokens) - left))

    def _stretch(self, row: Batch, here: np.ndarray, style: str, *, more: int) -> Text:
        """Consecutive tokens of a segment; `more` are left out."""
        text = Text()
        # A token is learned as the target of the one before it in its segment.
        weights = [float(row.loss_weights[place - 1]) if row.positions[place] else 0.0 for place in map(int, here)]
        looks = [(weight, self.names.get(int(row.tokens[place]))) for weight, place in zip(weights, here, strict=True)]
        start, inside = 0, 0.0
        for stop in range(1, len(here) + 1):
            if stop < len(here) and looks[stop] == looks[start]:
                continue
            weight, marker = looks[start]
            if not self._colors and weight != inside:
                text.append((_OTHER if inside else "") + (_opening(weight) if weight else ""))
            inside = weight
            ids = row.tokens[here[start:stop]]
            said = signs(self._template.decode(map(int, ids))) if marker is None else f"⟨{signs(marker)}⟩" * len(ids)
            look = f"bold {style}" if weight else "dim"
            text.append(said, style=f"{look} reverse" if marker is not None else look)
            if self._colors and weight not in (0, 1):
                text.append(f"×{weight:g}", style="yellow")
            start = stop
        if not self._colors and inside:
            text.append(_OTHER)
        text.rstrip()  # of the line end behind ↵
        if more > 0:
            text.append(f" … {more:,} tokens more (show_tokens=0 prints all)", style="dim")
        return text


def _opening(weight: float) -> str:
    return _LEARNED if weight == 1 else f"{_LEARNED}×{weight:g} "
