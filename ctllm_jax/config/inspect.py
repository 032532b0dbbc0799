"""`launch.py data`: which rows are looked at, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ctllm_jax.config.base import Section, key, section
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.config.stages import STAGES


class InspectConfig(Section):
    """`launch.py data inspect`: rows as the model sees them."""

    sequence_length: int | None = key(None, "length of a row (S); null: the dataset's own record length, 256 for text, 1024 for dialogues, 2048 for pairs", ge=1)
    rows: int = key(2, "rows to print", ge=1)
    start: int = key(0, "first row", ge=0)
    show_tokens: int = key(400, "tokens printed of a row; 0: all. Of pairs: of an answer", ge=0)
    ids: bool = key(False, "a table of ids, one token a line, instead of running text")
    split: str = key("train", "split to read; of a run's rows anything but train is what the run holds out")
    tokenizer: str | None = key(None, "tokenizer for a file that is not tokenized yet")
    kind: Literal["text", "dialogues", "pairs"] | None = key(None, "what a file holds; null: seen from the fields of its first record")
    text_field: str = key("text", "text: field of a record that holds it")
    isolate_documents: bool = key(True, "text: show segment ids and positions as with isolation")
    mask_eod: bool = key(True, "text: show loss weights as with EOD masking")
    template: TemplateConfig = section(TemplateConfig, "dialogues, pairs: how messages become ids")
    loss_on: Literal["answers", "last_answer", "everything"] = key("answers", "dialogues: tokens that are learned")
    over_length: Literal["drop", "truncate", "raise"] = key("drop", "dialogues, pairs: what becomes of one that is longer than a row")
    max_bad: int = key(0, "dialogues, pairs: rows that cannot be read put aside before the command fails", ge=0)


class VerifyConfig(Section):
    """`launch.py data verify`: it has no keys."""


@dataclass(frozen=True)
class Inspection:
    """What to look at: a file or dataset by `keys`, or the rows of a run of a stage."""

    keys: InspectConfig
    stage: str | None = None
    run: PretrainConfig | None = None


def plan_inspection(words: Sequence[str], overrides: Sequence[str]) -> Inspection:
    """The keys of `data inspect`; after a stage and a config those that the stage does not know, which gets the rest.

    Raises:
      UserError: all that is wrong with either.
    """
    if not words or words[0] not in STAGES:
        return Inspection(load(InspectConfig, overrides=overrides))
    stage, *rest = words
    if len(rest) != 1:
        raise UserError(f"data inspect {stage} needs one config, such as configs/quickstart/{stage}.yaml"
                        f"{'; found ' + ' '.join(rest) if rest else ''}")
    schema = STAGES[stage].schema
    own = [override for override in overrides if _first(override) in InspectConfig.model_fields
           and _first(override) not in schema.model_fields]
    keys = load(InspectConfig, overrides=own)
    given = [override for override in overrides if override not in own]
    return Inspection(keys, stage, load(schema, target=rest[0], overrides=given))


def _first(override: str) -> str:
    return override.partition("=")[0].partition(".")[0]
