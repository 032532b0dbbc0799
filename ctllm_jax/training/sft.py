"""Supervised fine-tuning as a stage: the objective of pretraining, over dialogues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctllm_jax.config.sft import SFTConfig, TemplateConfig
from ctllm_jax.data.sft import SFTData
from ctllm_jax.training.objective import Opened, next_tokens
from ctllm_jax.training.tuning import completed, take_over


def open_stage(config: SFTConfig, *, directory: Path | None = None, keep_texts: bool = False) -> Opened:
    """Take over from `config.init` what the config leaves open, and from the dialogues the number of steps.

    Args:
      directory: the run directory, which nothing here needs.
      keep_texts: also keep the dialogues that the rows are made of.

    Raises:
      UserError: no such MODEL, one with another template or architecture, or dialogues that do not fit.
    """
    start = take_over(config, fallback=TemplateConfig())
    config = config.model_copy(update={"data": config.data.model_copy(update={"template": start.template_config})})
    data = SFTData(config.data, tokenizer=start.tokenizer, sequence_length=config.batch.sequence_length,
                   rows=config.batch.rows, seed=config.seed, vocab_size=start.model.vocab_size,
                   template=start.template, keep_dialogues=keep_texts)
    whole = completed(config, model=start.model.model_dump(), steps=config.steps or data.steps)
    return Opened(whole, data, next_tokens(data.token_bytes), start.meta)


def print_data(report: dict[str, Any], console: Any) -> None:
    """Print what was read from each source, what was left out and why, and the totals of each group."""
    from rich import box
    from rich.table import Table

    table = Table("source", "group", "layout", "read", "left out", "dialogues", "tokens", "learned",
                  box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name, source in report["sources"].items():
        reasons = {**source["dropped"], **{reason: source[reason] for reason in
                                           ("over_length", "nothing_learned", "not_drawn")}}
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
        table.add_row(name, source["group"], ", ".join(source["layouts"]), f"{source['read']:,}", left_out or "–",
                      f"{source['rows']:,}", f"{source['tokens']:,}", f"{source['learned_tokens']:,}")
    console.print(table)
    if report["ratio"] or len(report["groups"]) > 1:
        parts = (f"{group}: {found['rows']:,} dialogues, {found['tokens']:,} tokens"
                 for group, found in report["groups"].items())
        console.print(f"ratio {report['ratio'] or 'as it is'}: " + "; ".join(parts))
    console.print(f"{report['rows_per_epoch']:,} rows, {report['filled']:.1%} full; {report['steps_per_epoch']:,} "
                  f"steps an epoch; {report['held_out']:,} dialogues held out")
