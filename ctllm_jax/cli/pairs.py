"""`launch.py pairs data=FILE rejected=MODEL output=FILE`: preference pairs from good answers and a weaker model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pairs import PairsConfig

if TYPE_CHECKING:
    from ctllm_jax.cli import Context
    from ctllm_jax.data.prompts import Prompts
    from ctllm_jax.inference.pair_file import PairFile

SCHEMA = PairsConfig
TAKES_CONFIG = True
CONFIG_IS_OPTIONAL = True
USAGE = """
usage: python launch.py pairs [CONFIG] data=FILE rejected=MODEL output=FILE [key=value …] [--dry-run | --print-config]

For each prompt of data (messages, ShareGPT, Alpaca, prompt/completion; JSONL, JSON, Parquet) a weaker model gives the
rejected answer. The chosen one is the last answer of the dialogue in data, or an endpoint's. A MODEL is a run directory
of sft or dpo, or RUN@STEP; an endpoint is any server of OpenAI's chat completions. The output goes into dpo as it is.
The same command continues where it stopped, and retries failed prompts:
  python launch.py pairs data=dialogues.jsonl rejected=runs/chat output=pairs.jsonl
  python launch.py pairs data=dialogues.jsonl rejected.base_url=http://localhost:8000/v1 rejected.model=NAME output=FILE
  python launch.py pairs configs/data/pairs_ct_llm.yaml data=questions.jsonl output=data/dpo/zh.jsonl limit=100
"""


def run(context: Context) -> int:
    """Read the prompts, ask both sides, and print the counts."""
    config, console = context.config, context.console
    from rich.markup import escape

    from ctllm_jax.cli.progress import count_bar
    from ctllm_jax.data.prompts import read_prompts
    from ctllm_jax.inference.answers import EndpointAnswers, GivenAnswers, ModelAnswers, make_tasks
    from ctllm_jax.inference.pair_file import PairFile
    from ctllm_jax.inference.pairs import make_pairs, settings_of

    if not Path(config.data.path).exists():
        raise UserError(f"data.path={config.data.path} does not exist")
    chosen = EndpointAnswers(config.chosen, seed=config.seed) if config.chosen else GivenAnswers()
    side = EndpointAnswers if config.rejected.base_url else ModelAnswers
    rejected = side(config.rejected, seed=config.seed)
    read = read_prompts(config.data.path, with_answers=config.chosen is None, layout=config.data.layout,
                        max_bad=config.data.max_bad)
    tasks, copies = make_tasks(read.prompts)
    tasks = tasks[:config.limit]
    planned, refused = rejected.plan(tasks)
    reasons = {**read.dropped, "copy of an earlier row": copies,
               "beyond limit": len(read.prompts) - copies - len(tasks), **refused}
    layouts = ", ".join(dict.fromkeys(read.layouts.values()))
    console.print(f"{len(planned):,} prompts of {escape(config.data.path)}: {escape(layouts)}")
    console.print(f"  chosen    {escape(chosen.name)}\n  rejected  {escape(rejected.name)}")
    if not planned:
        show_outcome(read, reasons, None, console)
        raise UserError("no prompt is left to make a pair of")
    if context.dry_run:
        show_outcome(read, reasons, None, console)
        console.print(f"would be asked, and written to {escape(config.output)}; nothing was started")
        return 0
    with PairFile(config.output, settings_of(config, chosen, rejected)) as file:
        there, done = file.pairs, sum(task.key in file.done for task in planned)
        if done:
            console.print(f"going on: {done:,} of them are there")
        with count_bar(console, "pairs", total=len(planned), done=done) as advance:
            failed = make_pairs(config, planned, chosen=chosen, rejected=rejected, file=file, advance=advance)
    show_outcome(read, {**reasons, **file.dropped, "failed": failed}, file, console)
    console.print(f"{escape(str(file.path))}: {file.pairs:,} pairs, {file.pairs - there:,} of them new")
    if failed:
        console.print(f"[yellow]warning:[/] {failed:,} prompts have no answer yet; the same command asks again")
    if file.pairs:
        init = "MODEL" if config.rejected.base_url else config.rejected.model
        keys = shlex.join([f"init={init}", f"data={config.output}"])
        console.print(f"next: python launch.py dpo CONFIG {escape(keys)}")
    return 0 if file.pairs else 1


def show_outcome(read: Prompts, reasons: dict[str, int], file: PairFile | None, console) -> None:
    """Counts of read prompts, of those left out by reason, and of pairs."""
    from rich import box
    from rich.table import Table

    table = Table("rows", "", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.columns[1].justify = "right"
    table.add_row("read", f"{read.rows:,}")
    for reason, count in reasons.items():
        if count:
            table.add_row(f"  {reason}", f"{count:,}")
    if file is not None:
        table.add_row("pairs", f"{file.pairs:,}")
    console.print(table)
