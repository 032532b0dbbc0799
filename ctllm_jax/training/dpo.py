"""Training on preferences (DPO and its relatives): the shared step with a loss over pairs of answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ctllm_jax.config.dpo import DPOConfig, PreferenceLossConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.data.batch import Batch
from ctllm_jax.data.preference import PreferenceData
from ctllm_jax.losses.preference import KINDS, Answers, pair_logps, preference_loss
from ctllm_jax.model.decoder import Decoder
from ctllm_jax.training.objective import Objective, Opened
from ctllm_jax.training.reference import answer_logps, attach_reference
from ctllm_jax.training.step import STEP_METRICS
from ctllm_jax.training.tuning import completed, take_over


def open_stage(config: DPOConfig, *, directory: Path | None = None, keep_texts: bool = False) -> Opened:
    """Take over from `config.init` what the config leaves open, and from the pairs the number of steps.

    The log-probabilities of the reference are not there yet: `prepare` of the result computes them.

    Args:
      directory: the run directory, which nothing here needs.
      keep_texts: also keep the pairs that the rows are made of.

    Raises:
      UserError: no such MODEL, one with another template or architecture, pairs that do not fit, or a loss whose
        options contradict each other.
    """
    check_loss(config.loss)
    start = take_over(config, fallback=None)
    data = PreferenceData(config.data, template=start.template, tokenizer=start.tokenizer,
                          sequence_length=config.batch.sequence_length, context_length=start.model.context_length,
                          rows=config.batch.rows, seed=config.seed, vocab_size=start.model.vocab_size,
                          keep_pairs=keep_texts)
    steps = config.steps or data.steps
    optimizer = config.optimizer.model_dump()
    if config.warmup_ratio is not None:
        optimizer["warmup_steps"] = int(config.warmup_ratio * steps)
    whole = completed(config, model=start.model.model_dump(), steps=steps, optimizer=optimizer)
    objective = make_objective(data)

    def prepare(directory: Path, progress: Callable[[str], None], beat: Callable[[], None]) -> str:
        found = attach_reference(whole, data, objective, directory=directory, stage=progress, beat=beat)
        return (f"reference: {found['answers']:,} answers, {found['how']}; checked to {found['difference']:.1e} nats"
                f" a token (at most {found['tolerance']:.1e})")

    return Opened(whole, data, objective, start.meta, prepare if needs_reference(config) else None)


def needs_reference(config: DPOConfig) -> bool:
    """Whether the loss compares with the model that training starts from."""
    return KINDS[config.loss.kind].reference


def make_objective(data: PreferenceData) -> Objective:
    """The loss over pairs; with several groups, metrics of each too."""
    groups = tuple(data.group_names) if len(data.group_names) > 1 else ()

    def make(config: DPOConfig, decoder: Decoder, mesh: jax.sharding.Mesh | None) -> Callable:
        return make_loss_fn(config, decoder, mesh=mesh, groups=groups)

    return Objective(make, describe, num_segments=data.num_segments)


def make_loss_fn(config: DPOConfig, decoder: Decoder, *, mesh: jax.sharding.Mesh | None,
                 groups: tuple[str, ...] = ()) -> Callable:
    """`(params, frozen, batch) -> (sum of loss, pairs, sums of metrics)`; the batch has its `preference` part."""
    reference = needs_reference(config)
    options = config.loss.model_dump()

    def loss_fn(params: Any, frozen: Any, batch: Batch):
        known = batch.preference
        logps, lengths = answer_logps(decoder, params, batch, config=config, mesh=mesh)
        answers = Answers(logps, lengths, known.reference_logps if reference else None)
        chosen, rejected, weights = pair_logps(answers, known.pair_ids, known.is_chosen)
        return preference_loss(chosen, rejected, **options, weights=weights, group=known.group if groups else None,
                               groups=groups)

    return loss_fn


def describe(metrics: dict[str, float]) -> dict[str, float]:
    """Sums over pairs to means, under TRL's names; NAME/GROUP over that group's pairs, left out where it has none.

    A sum that TRL has no name for is shown as loss/NAME.
    """
    means = {"pairs": metrics["pairs"]}
    for name, value in metrics.items():
        kind, _, rest = name.partition("/")
        named = kind in ("rewards", "logps")
        if kind != "pairs" and name not in STEP_METRICS:
            group = rest.partition("/")[2] if named else ""
            if count := metrics[f"pairs/{group}" if group else "pairs"]:
                means[name if named else f"loss/{name}"] = value / count
    return means


def check_loss(config: PreferenceLossConfig) -> None:
    """UserError where an option of the loss would be ignored, or is missing."""
    one = np.ones(1, np.float32)
    answers = Answers(one, one, one if KINDS[config.kind].reference else None)
    try:
        jax.eval_shape(lambda: preference_loss(answers, answers, **config.model_dump()))
    except ValueError as error:
        raise UserError(f"loss: {error}") from None


def print_data(report: dict[str, Any], console: Any) -> None:
    """Print what was read from each source, and what was left out and why."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("source", "group", "layout", "read", "left out", "cut", "pairs", "tokens", "learned",
                  box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    lines = []
    for name, source in report["sources"].items():
        reasons = {**source["dropped"], "over-length prompt": source["over_length_prompt"],
                   "over-length": source["over_length"], "equal as tokens": source["equal_ids"]}
        if any(reasons.values()):
            left_out = ", ".join(f"{count:,} ({reason})" for reason, count in reasons.items() if count)
            lines.append(f"left out of {name}: {left_out}")
        table.add_row(name, source["group"], ", ".join(source["layouts"]), f"{source['read']:,}",
                      f"{sum(reasons.values()):,}", *(f"{source[figure]:,}" for figure in
                                                      ("cut", "pairs", "tokens", "learned_tokens")))
    console.print(table)
    for line in lines:
        console.print(Text(line))
    console.print(f"{report['rows_per_epoch']:,} rows of at most {report['num_segments'] // 2} pairs, "
                  f"{report['filled']:.1%} full; {report['steps_per_epoch']:,} steps an epoch; "
                  f"{report['held_out']:,} pairs held out")
