"""`launch.py evaluate MODEL`: which tasks, how they are asked, where the results go."""

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
    """What tasks=bits_per_byte measures."""

    sources: dict[str, HeldOutSourceConfig] = key({}, "name -> path, such as held_out.sources.zh=zh.jsonl; none: what the run held out of its training data")
    split: str = key("validation", "split of a dataset directory")
    max_tokens: int = key(1_000_000, "about so many tokens of each source: of a dataset directory the first, in the shuffled order of its documents; of text a random sample of documents", ge=1)


class EvaluateConfig(Section):
    """Tasks of lm-eval on a MODEL."""

    tasks: list[str] = key([], "tasks, subjects and groups between commas, such as cmmlu,ceval-valid,mmlu; evaluate list shows all; bits_per_byte: of held_out")
    suite: str | None = key(None, "in place of tasks: a file that names tasks and their examples, such as configs/eval/paper.yaml")
    num_fewshot: int | None = key(None, "examples before each question; null: the suite's number, else each task's own", ge=0)
    checkpoints: list[str] = key([], "of a run: all, milestones, or steps between commas, in place of one MODEL; a step that has these results is left out")
    held_out: HeldOutConfig = section(HeldOutConfig, "text for tasks=bits_per_byte")
    limit: float | None = key(None, "the first questions of each task, as lm-eval takes them; below 1: their share; null: all", gt=0)
    data: str | None = key(None, "folder of the official question files; null: data/evaluation")
    apply_chat_template: Literal["false", "true", "auto"] = key("false", "ask through the chat template that the model has learned; auto: if it has learned one")
    template: TemplateConfig | None = key(None, "with apply_chat_template=true: template for a model that has learned none")
    multiturn: bool = key(True, "behind a chat template, examples are earlier turns of the dialogue; false: part of the question")
    system: str | None = key(None, "system prompt of every question; @FILE reads it from a file", text=True)
    batch: int = key(8192, "tokens that go through the model at once", ge=1)
    max_length: int | None = key(None, "most tokens that the model sees at once, longer questions lose their beginning; null: the model's context", ge=2)
    dtype: Literal["float32", "bfloat16"] = key("float32", "what the model computes in; bfloat16 on accelerators takes half the memory")
    mesh: MeshConfig | None = key(None, "devices that the model is split over, such as {tensor: 4}; null: it lies on the first one")
    output: str | None = key(None, "folder for the results; null: RUN/evaluation/STEP. A Hugging Face folder needs it", output="folder")
    samples: bool = key(False, "write every question with its answers beside the results")
    seed: int = key(1234, "of drawn examples and texts", ge=0, lt=2**32)
    bootstrap: int = key(1000, "draws for standard errors of metrics that are no mean (lm-eval: 100000); 0: no standard errors at all", ge=0)

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
