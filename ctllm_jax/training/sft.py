"""Supervised fine-tuning: pretraining's step and loss over dialogues, from the weights of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.config.sft import SFTConfig
from ctllm_jax.data.sft import SFTData
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.training.checkpoint import find_checkpoint, read_model_config

Config = TypeVar("Config", bound=PretrainConfig)


class Tuning(NamedTuple):
    """A config without gaps, its dialogues, and what its checkpoints say of the template."""

    config: SFTConfig
    data: SFTData
    meta: dict[str, Any]


def open_tuning(config: SFTConfig) -> Tuning:
    """Take from `config.init` what the config leaves open (architecture, tokenizer), and from the data the steps.

    Raises:
      UserError: no such MODEL, one of another template or architecture, or dialogues that do not fit.
    """
    source, kept = find_checkpoint(config.init)
    model = read_model_config(source)
    if config.model is not None and config.model != model:
        raise UserError(f"model differs from that of init={config.init}: leave it out")
    tokenizer = load_tokenizer(config.data.tokenizer or tokenizer_of(source, config.init))
    data = SFTData(config.data, tokenizer=tokenizer, sequence_length=config.batch.sequence_length,
                   rows=config.batch.rows, seed=config.seed, vocab_size=model.vocab_size)
    known = kept.meta.get("template")
    if known and known["fingerprint"] != data.template.fingerprint():
        raise UserError(f"init={config.init} was tuned with the template {known['config']['kind']}, and data.template "
                        f"is another ({config.data.template.kind}): a model keeps the one it has learned")
    whole = completed(config, model=model.model_dump(), steps=config.steps or data.steps)
    template = {"config": config.data.template.model_dump(mode="json"), "fingerprint": data.template.fingerprint()}
    return Tuning(whole, data, {"template": template})


def completed(config: Config, **found: Any) -> Config:
    """The config with what was found for the keys that it leaves open, checked anew. UserError where it fails."""
    try:
        return type(config).model_validate(config.model_dump() | found)
    except ValidationError as error:
        raise UserError("; ".join(detail["msg"].removeprefix("Value error, ")
                                  for detail in error.errors(include_url=False))) from None


def tokenizer_of(directory: Path, name: str) -> str:
    """The tokenizer's file in the run directory of the MODEL `name`; UserError where there is none."""
    found = sorted(directory.glob("tokenizer.*"))
    if not found:
        raise UserError(f"init={name} has no tokenizer: it was trained on synthetic tokens; give data.tokenizer")
    return str(found[0])
