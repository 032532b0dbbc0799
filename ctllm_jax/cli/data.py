"""`launch.py data`: look at a dataset, check its sums."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.text import Text

from ctllm_jax.cli.inspection import find_kind, inspect_file, inspect_run
from ctllm_jax.cli.progress import stage_bars
from ctllm_jax.cli.rows import print_rows
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.inspect import InspectConfig, Inspection, VerifyConfig, plan_inspection
from ctllm_jax.data.batch import Batch
from ctllm_jax.data.tokenizer import load_tokenizer

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
_TEXT_ROW = 256  # tokens of a row where no dataset says otherwise


def configure(action: str, words: list[str], overrides: list[str]) -> Inspection | VerifyConfig:
    """The keys of an action; called before `run`."""
    from ctllm_jax.config.load import load

    return plan_inspection(words, overrides) if action == "inspect" else load(VerifyConfig, overrides=overrides)


def to_yaml(config: Inspection | VerifyConfig) -> str:
    """The output of --print-config: for the rows of a run, that run's config."""
    from ctllm_jax.config.load import to_yaml as one

    return one(config if isinstance(config, VerifyConfig) else config.run or config.keys)


def run(context) -> int:
    """Inspect or verify each target."""
    if context.action == "inspect" and context.config.run is not None:
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
