"""Training on preferences (DPO and its relatives): the shared step with a loss over pairs of answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ctllm_jax.config.dpo import DPOConfig, PreferenceLossConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.data.batch import Batch
from ctllm_jax.data.chat import open_template
from ctllm_jax.data.preference import PreferenceData
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.huggingface.tokenizer import kept_template
from ctllm_jax.losses.preference import KINDS, Answers, pair_logps, preference_loss
from ctllm_jax.model.decoder import Decoder
from ctllm_jax.model.lora import lora_parameters
from ctllm_jax.training.checkpoints.checkpoint import find_checkpoint, read_model_config
from ctllm_jax.training.joins import check_origin
from ctllm_jax.training.pretrain import Objective
from ctllm_jax.training.reference import answer_logps
from ctllm_jax.training.sft import check_template, completed, tokenizer_of
from ctllm_jax.training.step import STEP_METRICS


class Preferences(NamedTuple):
    """A config without gaps, its pairs, its objective, and what its checkpoints say of the template."""

    config: DPOConfig
    data: PreferenceData
    objective: Objective
    meta: dict[str, Any]


def open_preferences(config: DPOConfig, *, keep_pairs: bool = False) -> Preferences:
    """Take from `config.init` what the config leaves open, and from the data the steps; the reference is not there yet.

    With `keep_pairs` the data also has the texts that it was made from.

    Raises:
      UserError: no such MODEL, one of another template or architecture, pairs that do not fit, or a loss whose options
        contradict each other.
    """
    check_loss(config.loss)
    source, _ = find_checkpoint(config.init)
    model = config.model or read_model_config(source)
    if config.lora is not None:
        lora_parameters(model, config.lora)  # before the data, which may take minutes
    tokenizer = load_tokenizer(config.data.tokenizer or tokenizer_of(source, config.init))
    kept = check_origin(config, model, tokenizer=tokenizer.path)
    known = kept.meta.get("template")
    if config.data.template is None and not known:
        problem = kept.meta.get("template_problem")
        why = f"has a chat template that cannot be trained with ({problem})" if problem else (
            "was not taught to answer and has no template")
        raise UserError(f"init={config.init} {why}: tune it first (launch.py sft), or give data.template")
    template_config = config.data.template or kept_template(source, known)
    template = open_template(template_config, tokenizer)
    check_template(known, template_config, template, name=f"init={config.init}", field="data.template",
                   allow=config.allow_mismatch)
    data = PreferenceData(config.data, template=template, tokenizer=tokenizer,
                          sequence_length=config.batch.sequence_length, context_length=model.context_length,
                          rows=config.batch.rows, seed=config.seed, vocab_size=model.vocab_size,
                          keep_pairs=keep_pairs)
    steps = config.steps or data.steps
    optimizer = config.optimizer.model_dump()
    if config.warmup_ratio is not None:
        optimizer["warmup_steps"] = int(config.warmup_ratio * steps)
    whole = completed(config, model=model.model_dump(), steps=steps, optimizer=optimizer)
    meta = {"template": {"config": template_config.model_dump(mode="json"), "fingerprint": template.fingerprint()}}
    return Preferences(whole, data, make_objective(data), meta)


def needs_reference(config: DPOConfig) -> bool:
    """Whether the loss compares with the model that training starts from."""
    return KINDS[config.loss.kind].reference


def make_objective(data: PreferenceData) -> Objective:
    """The loss over pairs; with several groups, metrics of each too."""
    groups = tuple(data.group_names) if len(data.group_names) > 1 else ()

    def make(config: DPOConfig, decoder: Decoder, mesh: jax.sharding.Mesh | None) -> Callable:
        return make_loss_fn(config, decoder, mesh=mesh, groups=groups)

    return Objective(make, describe, data.num_segments)


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
