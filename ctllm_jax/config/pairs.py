"""`launch.py pairs`: prompts, and the sources of the better and the worse answers."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ctllm_jax.config.base import Section, key
from ctllm_jax.config.endpoint import EndpointConfig
from ctllm_jax.config.generate import HIGHEST_TEMPERATURE, MOST_TOP_K


class PromptSourceConfig(Section):
    """The prompts. A bare value is their path."""

    shorthand = "path"

    path: str = key(..., "dialogues, or only questions if chosen is an endpoint: JSON lines (.jsonl, .gz, .zst), a "
                         "JSON array (.json), Parquet, or a folder of these")
    layout: Literal["messages", "sharegpt", "alpaca", "prompt"] | None = key(None, "layout of a row; null: detected, and named in the log")
    max_bad: int = key(0, "rows that cannot be read (malformed JSON, wrong fields) set aside before the command fails", ge=0)


class RejectedConfig(EndpointConfig):
    """The source of the rejected answers. A bare value is a local MODEL."""

    shorthand = "model"

    base_url: str | None = key(None, "address of an OpenAI-compatible server, up to its version; null: model is a local MODEL")
    model: str = key(..., "MODEL (a run directory of sft or dpo, or RUN@STEP), or with base_url the name that the server knows", min_length=1)
    max_tokens: int | None = key(512, "largest number of tokens of an answer; a local MODEL also stops when its context is full", ge=1)
    temperature: float | None = key(0.8, "0: always the likeliest token; null: a server's default", ge=0, le=HIGHEST_TEMPERATURE)
    top_p: float | None = key(0.95, "sample from the likeliest tokens that together have this probability; null: from all, or a server's default", gt=0, le=1)
    top_k: int | None = key(None, "MODEL: sample from this many likeliest tokens", ge=1, le=MOST_TOP_K)
    batch_tokens: int = key(16_384, "MODEL: tokens, of prompts and answers, that are held in memory at a time: longer prompts, fewer rows", ge=1)
    min_room: int = key(16, "MODEL: tokens of its context that a prompt must leave for the answer", ge=1)

    @model_validator(mode="after")
    def _check(self):
        ours, theirs = ("top_k", "batch_tokens", "min_room"), (
            "api_key_env", "body", "send_seed", "timeout", "retries", "concurrency", "max_failures")
        fields = RejectedConfig.model_fields
        given = [name for name in (theirs if self.base_url is None else ours)
                 if getattr(self, name) != fields[name].get_default(call_default_factory=True)]
        if given and self.base_url is None:
            raise ValueError(f"{given[0]} is only read with base_url; without one, model={self.model} is a MODEL of ours")
        if given:
            hint = "; a server's own goes into body={top_k: …}" if given[0] == "top_k" else ""
            raise ValueError(f"{given[0]} is only read for a MODEL of ours, not with base_url{hint}")
        if self.base_url is None and (self.temperature is None or self.max_tokens is None):
            raise ValueError("temperature and max_tokens may only be null with base_url")
        return self


class PairsConfig(Section):
    """`launch.py pairs`: preference pairs for `dpo`."""

    data: PromptSourceConfig = key(..., "the prompts, with or without their good answers")
    chosen: EndpointConfig | None = key(None, "endpoint that gives the chosen answers; null: the last answer of each dialogue of data is chosen")
    rejected: RejectedConfig = key(..., "the weaker model for the rejected answers: a local MODEL or an endpoint")
    output: str = key(..., "file to write, ending in .jsonl; existing pairs are kept, and the same command continues", output="file")
    cut_answers: Literal["drop_chosen", "drop", "keep"] = key("drop_chosen", "handling of answers that max_tokens ended: drop the pair if it is the chosen one, if it is either, or keep all")
    limit: int | None = key(None, "only the first prompts, for a trial; without it the same command continues", ge=1, changeable=True)
    seed: int = key(0, "random seed; the draws of a prompt depend only on it and the prompt", ge=0, lt=2**32)

    @model_validator(mode="after")
    def _check(self):
        if not self.output.endswith(".jsonl") or "://" in self.output:
            raise ValueError(f"output={self.output} must be a file of this machine that ends in .jsonl")
        return self
