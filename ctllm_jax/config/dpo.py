"""`launch.py dpo`: pairs of answers, their template and packing, and the loss over them."""

from __future__ import annotations

from typing import Literal

from ctllm_jax.config.base import Section, key, section
from ctllm_jax.config.model import ModelConfig
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.config.sft import TemplateConfig


class PairSourceConfig(Section):
    """One source of pairs. A bare value is its path."""

    shorthand = "path"

    path: str = key(..., "JSON lines (.jsonl, .gz, .zst), a JSON array (.json), Parquet, or a folder of these", local=True)
    group: str = key("", "group name for separate metrics, such as zh or en; empty: the source's name")
    layout: Literal["trl", "sharegpt", "alpaca", "ultrafeedback", "hh"] | None = key(None, "layout of a row; null: detected, and named in the log")
    max_bad: int = key(0, "rows that cannot be read (malformed JSON, wrong fields) set aside before the run fails", ge=0)


class PairDataConfig(Section):
    """The pairs. A bare value is the path of a single source."""

    sources: dict[str, PairSourceConfig] = key(..., "name -> source; names appear in the report", min_length=1)
    tokenizer: str | None = key(None, "tokenizer (.model or tokenizer.json); null: the one of the model that training starts from", local=True)
    template: TemplateConfig | None = key(None, "chat template; null: the one that the model was trained with")
    over_length: Literal["drop", "truncate", "raise"] = key("drop", "a pair of more than sequence_length tokens, or an answer beyond the model's context: drop the pair, truncate its answers, or fail; counted in the report")
    pairs_per_row: int | None = key(None, "largest number of pairs per row; with 1, a step has as many pairs as the batch has rows; null: as many as fit into a row of at most two contexts", ge=1)
    held_out: float = key(0.0, "share of each source's prompts, chosen by a hash of their tokens, whose pairs are only evaluated", ge=0, lt=1)
    epochs: int = key(2, "times that every pair is seen", ge=1, changeable=True)
    reference: str | None = key(None, "file (.npz) of the reference log-probabilities, made if it does not exist; null: a file for each reference, tokenizer, template and length in the folder NAME.reference next to the first source", changeable=True)

    @classmethod
    def from_shorthand(cls, value: str) -> dict:
        """A path."""
        return {"sources": {"data": {"path": value}}}

    @property
    def groups(self) -> dict[str, str]:
        """The group of each source."""
        return {name: source.group or name for name, source in self.sources.items()}


class PreferenceLossConfig(Section):
    """The loss over pairs. A bare value is its kind."""

    shorthand = "kind"

    kind: Literal["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo_sum", "ipo_token_mean", "reference_free", "simpo", "orpo"] = key("sigmoid", "sigmoid: DPO; sigmoid_norm: by answer length; robust; hinge: SLiC; ipo_sum, ipo_token_mean; without a reference model: reference_free, simpo, orpo")
    beta: float = key(0.1, "strength of the penalty for leaving the reference: a smaller value allows larger changes", gt=0)
    label_smoothing: float = key(0.0, "assumed share of wrong labels; sigmoid, sigmoid_norm, robust, reference_free, simpo", ge=0, lt=0.5)
    gamma: float = key(0.0, "simpo: the target margin", ge=0)
    sft_weight: float = key(0.0, "weight of the chosen answer's own cross-entropy, added to the loss", ge=0)


class DPOConfig(PretrainConfig):
    """A DPO run."""

    steps: int | None = key(None, "optimizer steps; null: as many as data.epochs need", ge=1, changeable=True)
    init: str = key(..., "MODEL to start from, which is also the reference: a run directory, RUN@STEP, or a Hugging Face folder", changeable=True)
    model: ModelConfig | None = key(None, "the architecture; null: that of init")
    data: PairDataConfig = key(..., "the pairs")
    loss: PreferenceLossConfig = section(PreferenceLossConfig, "the loss")
    warmup_ratio: float | None = key(None, "share of warm-up steps, instead of optimizer.warmup_steps", ge=0, lt=1)

    def row_limit(self, context: int) -> tuple[int, str]:
        """The longest row that the pairs of a row can fill, since the context limits each answer, and what to change."""
        most = self.data.pairs_per_row
        limit = 2 * context * (most or 1)
        if most is None:
            return limit, (f"2 answers * model.context_length={context}, which hold any pair; to pack more pairs into a longer row,"
                           f" set data.pairs_per_row, at least {-(-self.batch.sequence_length // limit)}")
        return limit, f"2 answers * data.pairs_per_row={most} * model.context_length={context}"

    @property
    def isolated(self) -> bool:
        """Answers of a row never attend to each other."""
        return True
