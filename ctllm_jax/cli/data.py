"""`launch.py data`: look at a dataset, check its sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from rich import box
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ctllm_jax.cli.progress import stage_bars
from ctllm_jax.config.control import visible
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.inspect import InspectConfig, Inspection, VerifyConfig, plan_inspection
from ctllm_jax.data.batch import Batch
from ctllm_jax.data.tokenizer import Tokenizer, load_tokenizer

ACTIONS = {"inspect": InspectConfig, "verify": VerifyConfig}
USAGE = """
usage: python launch.py data inspect DIR|FILE [key=value …]
       python launch.py data inspect pretrain|sft|dpo CONFIG [key=value …]
       python launch.py data verify DIR …

inspect prints rows as the model sees them. FILE is text, dialogues or pairs, and needs tokenizer=, and template= where
it is not text. Before the words of a run, `data inspect` shows the rows of that run. verify checks sizes and hashes,
and decodes every record; its status is 1 if anything is wrong:
  python launch.py data inspect data/zh rows=3 sequence_length=512
  python launch.py data inspect corpus.jsonl tokenizer=tokenizer.model ids=true
  python launch.py data inspect dialogues.jsonl tokenizer=tokenizer.model template=plain
  python launch.py data inspect sft configs/quickstart/sft.yaml init=runs/quickstart data=dialogues.jsonl rows=1
  python launch.py data verify data/zh
"""
SEGMENT_STYLES = ("cyan", "green", "magenta", "yellow", "blue")
_NO_LOSS = "reverse"
_TEXT_ROW = 256  # tokens of a row where no dataset says otherwise


def configure(action: str, words: list[str], overrides: list[str]) -> Inspection | VerifyConfig:
    """The keys of an action; called before `run`."""
    from ctllm_jax.config.load import load

    return plan_inspection(words, overrides) if action == "inspect" else load(VerifyConfig, overrides=overrides)


def to_yaml(config: Inspection | VerifyConfig) -> str:
    """What --print-config shows: of a run's rows, that run's config."""
    from ctllm_jax.config.load import to_yaml as one

    return one(config if isinstance(config, VerifyConfig) else config.run or config.keys)


def run(context) -> int:
    """Inspect or verify each target."""
    if context.action == "inspect" and context.config.run is not None:
        from ctllm_jax.cli.inspection import inspect_run

        return inspect_run(context.config, context.console)
    if not context.targets:
        raise UserError(f"data {context.action} needs a dataset directory"
                        f"{', or a file of text, dialogues or pairs' if context.action == 'inspect' else ''}")
    statuses = [(_inspect if context.action == "inspect" else _verify)(context, Path(target))
                for target in context.targets]
    return max(statuses)


def _verify(context, directory: Path) -> int:
    from ctllm_jax.dataset.manifest import find_dataset, read_manifest
    from ctllm_jax.dataset.verify import verify

    directory = find_dataset(directory) or directory
    with stage_bars(context.console) as report:
        problems = verify(directory, progress=lambda done, total: report("verify", done, total))
    for problem in problems:
        context.console.print(Text.assemble(("bad ", "bold red"), problem))
    if not problems:
        splits = read_manifest(directory).splits
        counts = ", ".join(f"{name}: {split.total('tokens'):,} tokens in {split.total('records'):,} records, "
                           f"{len(split.shards)} shard{'s' * (len(split.shards) > 1)}" for name, split in
                           splits.items())
        context.console.print(Text.assemble(("good ", "bold green"), f"{directory}: {counts}"))
    return 1 if problems else 0


def _inspect(context, path: Path) -> int:
    config, console = context.config.keys, context.console
    from ctllm_jax.cli.inspection import find_kind, inspect_file
    from ctllm_jax.dataset.manifest import find_dataset

    found = find_dataset(path)
    if not found and (kind := find_kind(path, config)) != "text":
        return inspect_file(path, kind, config, console)
    if found:
        title, tokenizer, eod_id, rows = _dataset_rows(found, config)
    else:
        title, tokenizer, eod_id, rows = _text_rows(path, config)
    console.print(Text(title, style="bold"))
    if not print_rows(rows, tokenizer, eod_id, config, console):
        raise UserError(f"start={config.start}: {path} has fewer rows")
    return 0


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


def _dataset_rows(path: Path, config: InspectConfig):
    from ctllm_jax.data.packing import PackedRows
    from ctllm_jax.dataset.reader import Dataset

    dataset = Dataset(path)
    manifest = dataset.manifest
    packed = PackedRows(dataset.split(config.split), config.sequence_length or manifest.record_tokens,
                        isolate_documents=config.isolate_documents, mask_eod=config.mask_eod)
    title = (f"{path} ({config.split}): {len(packed):,} rows of {config.sequence_length or manifest.record_tokens} "
             f"tokens, {manifest.splits[config.split].total('documents'):,} documents")
    indices = range(config.start, min(config.start + config.rows, len(packed)))
    return title, load_tokenizer(dataset.tokenizer_path), manifest.eod_id, ((index, packed[index]) for index in indices)


def _text_rows(path: Path, config: InspectConfig):
    """Rows of text files, in reading order: nothing is dropped, held out or shuffled."""
    from ctllm_jax.data.packing import pack_row
    from ctllm_jax.dataset.reader import Window
    from ctllm_jax.dataset.text import Quarantine, find_files, read_documents

    if config.tokenizer is None:
        if not path.exists():
            raise UserError(f"{path}: there is no such file or folder")
        raise UserError(f"tokenizer must be given: {path} is not a dataset directory, which would carry its own")
    tokenizer = load_tokenizer(config.tokenizer)
    eod_id = tokenizer.vocab_size if tokenizer.eos_id is None else tokenizer.eos_id
    length = config.sequence_length or _TEXT_ROW
    files = find_files([str(path)])

    def rows() -> Iterator[tuple[int, Batch]]:
        quarantine = Quarantine(None, max_bad=0)
        stream, ends = [], []
        for document in read_documents(files, text_field=config.text_field, quarantine=quarantine):
            stream += [*tokenizer.encode(document.text), eod_id]
            ends.append(len(stream))
            if len(stream) > (config.start + config.rows) * length:
                break
        for index in range(config.start, config.start + config.rows):
            tokens = np.asarray(stream[index * length:(index + 1) * length + 1])
            if len(tokens):
                inside = np.asarray([end - index * length for end in ends if 0 < end - index * length <= len(tokens)],
                                    np.int32)
                yield index, pack_row(Window(tokens, inside), length, isolate_documents=config.isolate_documents,
                                      mask_eod=config.mask_eod)

    return f"{path}: rows of {length} tokens", tokenizer, eod_id, rows()


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
