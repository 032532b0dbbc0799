"""`launch.py judge`: the questions, the models that answer, and the model that rates the answers."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator, model_validator

from ctllm_jax.config.base import Section, key, section
from ctllm_jax.config.endpoint import EndpointConfig
from ctllm_jax.config.generate import HIGHEST_TEMPERATURE, MOST_TOP_K

MT_BENCH_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "humanities": 0.1, "science": 0.1, "stem": 0.1,
                         "reading": 0.0, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0}
"""MT-Bench's temperatures; those of humanities, stem and extraction are used for CHC-Bench's humanity, science and
reading."""

OF_A_MODEL = ("top_k", "batch_tokens", "min_room", "dtype")
OF_AN_ENDPOINT = ("name", "api_key_env", "body", "send_seed", "timeout", "retries", "concurrency", "max_failures")


class AnswersConfig(EndpointConfig):
    """Settings for answering, by the MODELs and by an additional endpoint."""

    base_url: str | None = key(None, "address of an OpenAI-compatible server that answers, up to its version; null: only the MODELs of the command line")
    model: str | None = key(None, "with base_url: name of the model, as the server knows it", min_length=1)
    name: str | None = key(None, "with base_url: its name in tables; null: model", min_length=1)
    system: str | None = key(None, "system prompt before each question; null: none", min_length=1, text=True)
    max_tokens: int | None = key(1024, "largest number of tokens of an answer; a MODEL also stops when its context is full; null, only with base_url: the server's limit", ge=1)
    temperature: float | None = key(0.7, "temperature of categories not in temperatures; 0: always the likeliest token", ge=0, le=HIGHEST_TEMPERATURE)
    temperatures: dict[str, float] = key(MT_BENCH_TEMPERATURES, "temperature by category; {}: temperature for all")
    top_p: float | None = key(None, "sample from the likeliest tokens that together have this probability; null: from all, or a server's default", gt=0, le=1)
    top_k: int | None = key(None, "MODEL: sample from this many likeliest tokens", ge=1, le=MOST_TOP_K)
    seed: int = key(0, "random seed of a MODEL, and of send_seed; the draws of an answer depend only on it and the question", ge=0, lt=2**32)
    dtype: Literal["float32", "bfloat16"] = key("float32", "MODEL: dtype of computation")
    batch_tokens: int = key(16_384, "MODEL: tokens, of questions and answers, that are held in memory at a time", ge=1)
    min_room: int = key(16, "MODEL: tokens of its context that a question must leave for the answer", ge=1)

    @model_validator(mode="after")
    def _check(self):
        if (self.base_url is None) != (self.model is None):
            raise ValueError("base_url and model go together: the address of a server, and a model that it knows; a MODEL of ours stands on the command line without a key")
        if self.base_url is None and (given := self.given(OF_AN_ENDPOINT)):
            raise ValueError(f"{given[0]} is only read with answers.base_url")
        if wrong := [name for name, value in self.temperatures.items() if not 0 <= value <= HIGHEST_TEMPERATURE]:
            raise ValueError(f"temperatures.{wrong[0]} must be from 0 to {HIGHEST_TEMPERATURE:g}")
        return self

    def given(self, names: tuple[str, ...]) -> list[str]:
        """The keys whose values differ from the default."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)]


class GraderConfig(EndpointConfig):
    """The model that rates."""

    temperature: float | None = key(0.0, "0: the likeliest token each time; null: the server's own default", ge=0)
    max_tokens: int | None = key(2048, "largest number of tokens of a judgment; a truncated one has no rating, and the judge is asked for the rating alone; null: the server's limit", ge=1)
    check: bool = key(True, "send one small request before the questions are answered, so that an unreachable judge is detected at once")
    prompts: str | None = key(None, "JSON lines in the layout of MT-Bench's judge_prompts.jsonl ; null: the prompts of this package, in Chinese")


class JudgeConfig(Section):
    """`launch.py judge`: CHC-Bench, MT-Bench, or any file of questions."""

    questions: str = key(..., "CHC-Bench's rows (query, category), MT-Bench's (turns, category, reference), or query alone: JSONL, JSON, Parquet, or a folder of these, such as one file a category")
    judge: GraderConfig = key(..., "the model that rates, behind an OpenAI-compatible endpoint")
    answers: AnswersConfig = section(AnswersConfig, "how the questions are answered")
    name: str | None = key(None, "name of the set in files and tables; null: that of questions")
    output: str | None = key(None, "folder for tables, page, answers and ratings; null: evaluation/STEP of the one run that answers", output="folder")
    compare: Literal["none", "first", "all"] = key("none", "in addition to ratings, ask the judge to choose between two answers, in both orders; first: each model against the first one, the baseline; all: all pairs")
    categories: list[str] = key([], "only these categories; empty: all")
    limit: int | None = key(None, "only this many questions of each category, for a trial; answers and ratings are kept for a full run", ge=1)
    resamples: int = key(10_000, "number of bootstrap draws over questions, for intervals", ge=100)

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.\-]+", value):
            raise ValueError("must be of letters, digits, _, - and ., as it goes into names of files")
        return value

    @model_validator(mode="after")
    def _check(self):
        if self.output is not None and "://" in self.output:
            raise ValueError(f"output={self.output} must be a folder of this machine")
        return self
