"""`launch.py prepare`: text to a dataset directory."""

from __future__ import annotations

import time

from rich import box
from rich.table import Table

from ctllm_jax.cli.progress import stage_bars
from ctllm_jax.config.data import PrepareConfig

SCHEMA = PrepareConfig
USAGE = """
usage: python launch.py prepare input=TEXT tokenizer=TOKENIZER output=DIR [key=value …] [--dry-run]

Reads text (.jsonl, .jsonl.gz, .jsonl.zst, .parquet: a document a record; .txt: a document a file; folders of these),
drops exact copies, holds documents out for validation, shuffles, tokenizes and packs them into a dataset directory.

  python launch.py prepare input=corpus/ tokenizer=tokenizer.model output=data/corpus
  python launch.py prepare input='[a.jsonl,b.parquet]' text_field=content tokenizer=t.json output=data/ab max_bad=9

What cannot be read is listed in OUTPUT/quarantine.jsonl (beside OUTPUT if the command fails).
"""


def run(context) -> int:
    """Prepare a dataset, and print what became of the documents."""
    from ctllm_jax.dataset.text import find_files
    from data_prep.pipeline import prepare

    config, console = context.config, context.console
    if context.dry_run:
        files = find_files(config.input)
        size = sum(file.stat().st_size for file in files)
        console.print(f"{len(files)} files, {size / 1e6:,.1f} MB on disk, would become {config.output} "
                      f"(records of {config.record_tokens} tokens, {config.shards} training shards)")
        return 0
    started = time.monotonic()
    with stage_bars(console) as report:
        summary = prepare(config, progress=report)
    manifest = summary.manifest
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title=config.output, title_justify="left",
                  title_style="bold")
    for column in ("split", "documents", "tokens", "text MB", "bytes/token", "records", "shards"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for name, split in manifest.splits.items():
        tokens, size = split.total("tokens"), split.total("text_bytes")
        table.add_row(name, f"{split.total('documents'):,}", f"{tokens:,}", f"{size / 1e6:,.1f}",
                      f"{size / tokens:.2f}", f"{split.total('records'):,}", f"{len(split.shards):,}")
    console.print(table)
    console.print(f"read {summary.read:,} documents: {summary.duplicates:,} copies dropped, {summary.empty:,} empty, "
                  f"{summary.bad:,} bad{f' (see {config.output}/quarantine.jsonl)' if summary.bad else ''}; "
                  f"{time.monotonic() - started:.1f} s")
    console.print(f"next: [bold]python launch.py data inspect {config.output}[/bold]")
    return 0
