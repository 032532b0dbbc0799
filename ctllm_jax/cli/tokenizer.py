"""`launch.py tokenizer`: train a SentencePiece model."""

from __future__ import annotations

import time

from rich import box
from rich.table import Table

from ctllm_jax.cli.progress import stage_bars
from ctllm_jax.config.data import TokenizerTrainConfig

SCHEMA = TokenizerTrainConfig
USAGE = """
usage: python launch.py tokenizer input=TEXT output=FILE.model vocab_size=N [key=value …] [--dry-run]

Trains SentencePiece BPE with the options of Baichuan2's tokenizer: byte fallback, digits one by one, identity
normalization, white space kept, no dummy prefix; ids 0 unknown, 1 beginning, 2 end.

  python launch.py tokenizer input=corpus/ output=tokenizer.model vocab_size=8000
"""


def run(context) -> int:
    """Train a tokenizer, and print how it compresses each language."""
    from ctllm_jax.dataset.text import find_files
    from data_prep.train_tokenizer import LANGUAGES, train_tokenizer

    config, console = context.config, context.console
    if context.dry_run:
        files = find_files(config.input, links=config.links)
        size = sum(file.stat().st_size for file in files)
        console.print(f"{len(files)} files, {size / 1e6:,.1f} MB on disk, at most {config.max_sentences:,} lines of "
                      f"them, would train {config.vocab_size:,} pieces into {config.output}")
        return 0
    started = time.monotonic()
    with stage_bars(console) as report:
        tokenizer, compression = train_tokenizer(config, progress=lambda done, total: report("read", done, total))
    title = f"{config.output}: {tokenizer.vocab_size:,} pieces"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title=title, title_justify="left",
                  title_style="bold")
    for column in ("language", "text MB", "tokens", "bytes/token"):
        table.add_column(column, justify="left" if column == "language" else "right")
    for language in LANGUAGES:
        if compression.tokens[language]:
            table.add_row(language, f"{compression.text_bytes[language] / 1e6:,.2f}",
                          f"{compression.tokens[language]:,}", f"{compression.bytes_per_token(language):.2f}")
    console.print(table)
    console.print(f"measured on a sample of the training lines, told apart by their characters; "
                  f"{time.monotonic() - started:.1f} s")
    return 0
