"""`launch.py data`: which rows are shown, and how."""

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
    show_tokens: int = key(400, "number of tokens printed per row, or per answer of a pair; 0: all", ge=0)
    ids: bool = key(False, "print a table of ids, one token per line, instead of running text")
    split: str = key("train", "split to read; for the rows of a run, anything but train means its held-out rows")
    tokenizer: str | None = key(None, "tokenizer for a file that is not tokenized yet")
    kind: Literal["text", "dialogues", "pairs"] | None = key(None, "content of a file; null: detected from the fields of its first record")
    text_field: str = key("text", "text: field of a record that holds it")
    isolate_documents: bool = key(True, "text: show segment ids and positions as with isolation")
    mask_eod: bool = key(True, "text: show loss weights as with EOD masking")
    template: TemplateConfig = section(TemplateConfig, "dialogues, pairs: chat template")
    loss_on: Literal["answers", "last_answer", "everything"] = key("answers", "dialogues: trained tokens")
    over_length: Literal["drop", "truncate", "raise"] = key("drop", "dialogues, pairs: handling of one that is longer than a row")
    max_bad: int = key(0, "dialogues, pairs: rows that cannot be read set aside before the command fails", ge=0)


class VerifyConfig(Section):
    """`launch.py data verify`: it has no keys."""


@dataclass(frozen=True)
class Inspection:
    """The input to inspect: a file or dataset by `keys`, or the rows of a run of a stage."""

    keys: InspectConfig
    stage: str | None = None
    run: PretrainConfig | None = None


def plan_inspection(words: Sequence[str], overrides: Sequence[str]) -> Inspection:
    """Split the words into keys of `data inspect` and, after a stage and a config, keys of that stage.

    Raises:
      UserError: either has errors; all are listed.
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
