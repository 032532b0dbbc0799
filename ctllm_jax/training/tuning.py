"""Training from the weights of another run: what a stage takes over from it, and the text side of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from ctllm_jax.config.dpo import DPOConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.model import ModelConfig
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.config.sft import SFTConfig, TemplateConfig
from ctllm_jax.data.chat import ChatTemplate
from ctllm_jax.data.templates import open_template
from ctllm_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer, find_tokenizer, load_tokenizer
from ctllm_jax.huggingface.tokenizer import kept_template, spoken_additions
from ctllm_jax.model.lora import lora_parameters
from ctllm_jax.training.checkpoints.checkpoint import Kept, find_checkpoint, read_model_config
from ctllm_jax.training.joins import check_origin, refuse

Config = TypeVar("Config", bound=PretrainConfig)


class Start(NamedTuple):
    """What a stage takes over from the model that it starts from."""

    model: ModelConfig
    tokenizer: Tokenizer
    template_config: TemplateConfig
    template: ChatTemplate

    @property
    def meta(self) -> dict[str, Any]:
        """What the stage's checkpoints state about the template."""
        return {"template": {"config": self.template_config.model_dump(mode="json"),
                             "fingerprint": self.template.fingerprint()}}


def take_over(config: SFTConfig | DPOConfig, *, fallback: TemplateConfig | None) -> Start:
    """Take from `config.init` what the config leaves open: architecture, tokenizer and template.

    Args:
      fallback: the template where neither the config nor the model has one; None: that is an error.

    Raises:
      UserError: no such MODEL, or one with another template or architecture.
    """
    source, _ = find_checkpoint(config.init)
    model = config.model or read_model_config(source)
    if config.lora is not None:
        lora_parameters(model, config.lora)  # before the data, which may take minutes
    tokenizer = load_tokenizer(config.data.tokenizer or tokenizer_of(source, config.init))
    kept = check_origin(config, model, tokenizer=tokenizer.path)
    known, problem = kept.meta.get("template"), kept.meta.get("template_problem")
    if config.data.template is None and not known and (problem or fallback is None):
        why = f"has a chat template that cannot be trained with ({problem})" if problem else (
            "was not taught to answer and has no template")
        first = "tune it first (launch.py sft), or " if fallback is None else ""
        raise UserError(f"init={config.init} {why}: {first}give data.template")
    template_config = config.data.template or kept_template(source, known) or fallback
    template = open_template(template_config, tokenizer)
    check_template(known, template_config, template, name=f"init={config.init}", field="data.template",
                   allow=config.allow_mismatch)
    return Start(model, tokenizer, template_config, template)


def check_template(known: dict[str, Any] | None, config: TemplateConfig, template: ChatTemplate, *, name: str,
                   field: str, allow: bool | None = None) -> None:
    """UserError, with each difference, where a checkpoint was tuned with another template than is asked for.

    Args:
      known: `template` of the checkpoint's `meta`; None where it has learned none.
      config, template: what is asked for.
      name, field: the MODEL and the config's key, as the message calls them.
      allow: `allow_mismatch` of the config, if it has that key.
    """
    if not known or known["fingerprint"] == template.fingerprint():
        return
    asked = config.model_dump(mode="json")
    differing = [f"{key}: {value!r} there, {asked.get(key)!r} here" for key, value in known["config"].items()
                 if asked.get(key) != value] or ["the tokenizer, or the template's file, is another"]
    refuse(differing, what=f"{name} was tuned with another template than {field}={config.kind}, and a model keeps the"
                           " one it has learned", allow=allow)


def completed(config: Config, **found: Any) -> Config:
    """The config with what was found for the keys that it leaves open, checked anew. UserError where it fails."""
    try:
        return type(config).model_validate(config.model_dump() | found)
    except ValidationError as error:
        raise UserError("; ".join(detail["msg"].removeprefix("Value error, ")
                                  for detail in error.errors(include_url=False))) from None


def open_text(checkpoint: Kept) -> tuple[Tokenizer, ChatTemplate | None]:
    """The tokenizer of a checkpoint, and the template that it has learned.

    Raises:
      UserError: there is no tokenizer, or the template is not the one that the checkpoint was tuned with.
    """
    run_dir = checkpoint.run_dir
    found = find_tokenizer(run_dir)
    if found is None:
        raise UserError(f"{run_dir} has no tokenizer: it was trained on synthetic tokens, and has no text to write")
    tokenizer, known = load_tokenizer(found), checkpoint.meta.get("template")
    trained_with = checkpoint.meta.get("fingerprint", {}).get("data", {}).get("tokenizer_sha256", tokenizer.sha256)
    if tokenizer.sha256 != trained_with:
        raise UserError(f"{found} is not the tokenizer that {run_dir} was trained with: its sha256 begins with"
                        f" {tokenizer.sha256[:12]} instead of {trained_with[:12]}; put the original file back")
    if isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer.name_added(spoken_additions(run_dir))
    template = known and open_template(kept_template(run_dir, known), tokenizer)
    if known and template.fingerprint() != known["fingerprint"]:
        raise UserError(f"{run_dir}: its template is not the one that it was tuned with: its tokenizer or its template "
                        "file was changed")
    return tokenizer, template or None


def tokenizer_of(directory: Path, name: str) -> str:
    """The tokenizer's file in the run directory of the MODEL `name`; UserError where there is none."""
    found = find_tokenizer(directory)
    if found is None:
        raise UserError(f"init={name} has no tokenizer: it was trained on synthetic tokens; give data.tokenizer")
    return str(found)
