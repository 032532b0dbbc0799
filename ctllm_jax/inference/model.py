"""A MODEL as commands take it: its weights, decoder and tokenizer, ready to be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data.chat import ChatTemplate, Message, open_template
from ctllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from ctllm_jax.inference.generate import generate
from ctllm_jax.model.decoder import Decoder
from ctllm_jax.training.checkpoint import find_checkpoint, load_whole, read_model_config
from ctllm_jax.training.sft import check_template


@dataclass(frozen=True)
class Model:
    """A trained model.

    Attributes:
      prefix_id: id that preceded documents in training; None where none did.
      stop_id: id that ends a document.
      template: how it was taught to talk; None for a model that was not.
    """

    decoder: Decoder
    params: Any
    tokenizer: Tokenizer
    prefix_id: int | None
    stop_id: int | None
    run_dir: Path
    step: int
    template: ChatTemplate | None = None

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end what the model writes."""
        return [*(self.template.stop_ids if self.template else ()), *([] if self.stop_id is None else [self.stop_id])]

    def complete(self, prompts: Sequence[str], **options: Any) -> list[str]:
        """What the model writes behind each prompt; options as of `inference.generate.generate`."""
        ids = encode_prompts(self.tokenizer, prompts, prefix_id=self.prefix_id, stop_id=self.stop_id)
        new = generate(self.decoder, self.params, ids, stop_ids=self.stop_ids, **options)
        return [decode_completion(self.tokenizer, prompt, tokens) for prompt, tokens in zip(ids, new, strict=True)]


def with_template(model: Model, config: TemplateConfig, *, name: str) -> Model:
    """The model, asked through a template that it has not learned; `name` is the MODEL that it was loaded from.

    Raises:
      UserError: it has learned another one, or the template has ids that the model has not.
    """
    template = open_template(config, model.tokenizer)
    _, kept = find_checkpoint(name)
    check_template(kept.meta.get("template"), config, template, name=name, field="template")
    largest = max([*template.prompt_ids([Message("user", "")]), *template.stop_ids])
    if largest >= model.decoder.config.vocab_size:
        raise UserError(f"template={config.kind} has the id {largest}, and {name} has ids up to "
                        f"{model.decoder.config.vocab_size - 1} only")
    return replace(model, template=template)


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], *, prefix_id: int | None,
                   stop_id: int | None) -> list[list[int]]:
    """Ids of prompts as they would stand in training; an empty one starts behind the end of another document.

    Raises:
      UserError: an empty prompt, where no id begins a document.
    """
    rows = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        prefix = prefix_id if ids else (stop_id if prefix_id is None else prefix_id)
        if not ids and prefix is None:
            raise UserError("prompt is empty, and this model has no id that begins a document: give it some text")
        rows.append(([] if prefix is None else [prefix]) + ids)
    return rows


def decode_completion(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of new tokens behind a prompt: a character begun by the prompt's last bytes is not cut."""
    before = tokenizer.decode(list(prompt))
    text = tokenizer.decode([*prompt, *new])
    return text[len(before):] if text.startswith(before) else tokenizer.decode(list(new))


def load_model(model: str) -> Model:
    """The MODEL of a run directory or RUN@STEP, in float32 on the first device; a LoRA run's with its adapters merged.

    Raises:
      UserError: no such run, step or tokenizer.
    """
    run_dir, kept = find_checkpoint(model)
    config = read_model_config(run_dir)
    found = sorted(run_dir.glob("tokenizer.*"))
    if not found:
        raise UserError(f"{run_dir} has no tokenizer: it was trained on synthetic tokens, and has no text to write")
    tokenizer = load_tokenizer(found[0])
    known = kept.meta.get("template")
    template = known and open_template(TemplateConfig(**known["config"]), tokenizer)
    if known and template.fingerprint() != known["fingerprint"]:
        raise UserError(f"{run_dir}: its template is not the one that it was tuned with: its tokenizer or its template "
                        "file was changed")
    return Model(Decoder(config, dtype=jnp.float32), load_whole(kept), tokenizer, kept.meta.get("prefix_id"),
                 kept.meta.get("eod_id"), run_dir, kept.step, template)
