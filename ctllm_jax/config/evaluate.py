"""`launch.py evaluate MODEL`: tasks, settings, and the place of the results."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from ctllm_jax.config.base import Section, key, section
from ctllm_jax.config.model import MeshConfig
from ctllm_jax.config.sft import TemplateConfig


class HeldOutSourceConfig(Section):
    """Held-out text of one source or language. A bare value is its path."""

    shorthand = "path"

    path: str = key(..., "a dataset directory made with the model's tokenizer, or text: .jsonl(.gz|.zst), .parquet, .txt, or a folder of these")
    text_field: str = key("text", "field of a record that holds the text")


class HeldOutConfig(Section):
    """Text for tasks=bits_per_byte."""

    sources: dict[str, HeldOutSourceConfig] = key({}, "name -> path, such as held_out.sources.zh=zh.jsonl; none: the held-out part of the run's training data")
    split: str = key("validation", "split of a dataset directory")
    max_tokens: int = key(1_000_000, "approximate number of tokens of each source: the first ones of a dataset directory, whose documents are shuffled; a random sample of documents of text", ge=1)


class EvaluateConfig(Section):
    """Tasks of lm-eval on a MODEL."""

    tasks: list[str] = key([], "tasks, subjects and groups between commas, such as cmmlu,ceval-valid,mmlu; evaluate list shows all; bits_per_byte: of held_out")
    suite: str | None = key(None, "instead of tasks: a file that names tasks and their number of examples, such as configs/eval/paper.yaml")
    num_fewshot: int | None = key(None, "examples before each question; null: the suite's number, else each task's own", ge=0)
    checkpoints: list[str] = key([], "checkpoints of a run, instead of one MODEL: all, milestones, or steps separated by commas; steps with existing results are skipped")
    held_out: HeldOutConfig = section(HeldOutConfig, "text for tasks=bits_per_byte")
    limit: float | None = key(None, "number of first questions of each task, as in lm-eval; below 1: their share; null: all", gt=0)
    data: str | None = key(None, "folder of the official question files; null: data/evaluation")
    apply_chat_template: Literal["false", "true", "auto"] = key("false", "use the chat template that the model was trained with; auto: if there is one")
    template: TemplateConfig | None = key(None, "with apply_chat_template=true: template for a model that was trained without one")
    multiturn: bool = key(True, "with a chat template, examples are earlier turns of the dialogue; false: part of the question")
    system: str | None = key(None, "system prompt of every question; @FILE reads it from a file", text=True)
    batch: int = key(8192, "number of tokens in one forward pass", ge=1)
    max_length: int | None = key(None, "largest number of tokens of an input; longer questions lose their beginning; null: the model's context", ge=2)
    dtype: Literal["float32", "bfloat16"] = key("float32", "dtype of computation; bfloat16 on accelerators needs half the memory")
    mesh: MeshConfig | None = key(None, "mesh that the model is sharded over, such as {tensor: 4}; null: the first device")
    output: str | None = key(None, "folder for the results; null: RUN/evaluation/STEP. A Hugging Face folder needs it", output="folder")
    samples: bool = key(False, "also write a file with every question and its answers")
    seed: int = key(1234, "random seed of examples and texts", ge=0, lt=2**32)
    bootstrap: int = key(1000, "number of bootstrap draws for standard errors of metrics that are not means (lm-eval: 100000); 0: no standard errors at all", ge=0)

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, value: list[str]) -> list[str]:
        value = [name.strip() for name in value]
        if not all(value) or len(set(value)) < len(value):
            raise ValueError(f"tasks={','.join(value)} must be names between commas, none empty, each once")
        return value

    @field_validator("checkpoints")
    @classmethod
    def _check_checkpoints(cls, value: list[str]) -> list[str]:
        value = [name.strip() for name in value]
        if value not in ([], ["all"], ["milestones"]) and not all(name.isdigit() for name in value):
            raise ValueError(f"checkpoints={','.join(value)} must be all, milestones, or steps between commas")
        return value

    @model_validator(mode="after")
    def _check_held_out(self):
        if self.held_out.sources and "bits_per_byte" not in self.tasks:
            raise ValueError("held_out.sources is only read with tasks=bits_per_byte")
        return self

    @model_validator(mode="after")
    def _check(self):
        if bool(self.tasks) == (self.suite is not None):
            raise ValueError("needs tasks=NAME,… or suite=FILE" + (", not both" if self.tasks else ""))
        return self

    @field_validator("limit")
    @classmethod
    def _check_limit(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and value != int(value):
            raise ValueError(f"limit={value} must be a whole number of questions, or a share below 1")
        return value
