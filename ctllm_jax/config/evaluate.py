"""`launch.py evaluate MODEL`: which tasks, how they are asked, where the results go."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from ctllm_jax.config.base import Section, key
from ctllm_jax.config.model import MeshConfig
from ctllm_jax.config.sft import TemplateConfig


class EvaluateConfig(Section):
    """Tasks of lm-eval on a MODEL."""

    tasks: list[str] = key([], "tasks, subjects and groups between commas, such as cmmlu,ceval-valid,mmlu; evaluate list shows all")
    suite: str | None = key(None, "in place of tasks: a file that names tasks and their examples, such as configs/eval/paper.yaml")
    num_fewshot: int | None = key(None, "examples before each question; null: the suite's number, else each task's own", ge=0)
    limit: float | None = key(None, "questions of each task; below 1: their share; null: all", gt=0)
    data: str | None = key(None, "folder of the official question files; null: data/evaluation")
    apply_chat_template: Literal["false", "true", "auto"] = key("false", "ask through the chat template that the model has learned; auto: if it has learned one")
    template: TemplateConfig | None = key(None, "with apply_chat_template=true: template for a model that has learned none")
    multiturn: bool = key(True, "behind a chat template, examples are earlier turns of the dialogue; false: part of the question")
    system: str | None = key(None, "system prompt of every question; @FILE reads it from a file", text=True)
    batch: int = key(8192, "tokens that go through the model at once", ge=1)
    max_length: int | None = key(None, "most tokens that the model sees at once, longer questions lose their beginning; null: the model's context", ge=2)
    dtype: Literal["float32", "bfloat16"] = key("float32", "what the model computes in; bfloat16 on accelerators takes half the memory")
    mesh: MeshConfig | None = key(None, "devices that the model is split over, such as {tensor: 4}; null: it lies on the first one")
    output: str | None = key(None, "folder for the results; null: RUN/evaluation/STEP. A Hugging Face folder needs it")
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
