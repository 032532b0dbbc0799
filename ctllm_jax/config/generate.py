"""`launch.py generate MODEL`: text from a trained model."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ctllm_jax.config.base import Section, key

HIGHEST_TEMPERATURE = 100.0
MOST_TOP_K = 2**31 - 1
PENALTIES = (0.01, 100.0)
"""Bounds of numbers that decide a draw: inside them nothing overflows in float32 and int32."""


class DrawingConfig(Section):
    """How tokens are drawn, wherever a MODEL writes."""

    top_k: int | None = key(None, "draw from this many likeliest tokens", ge=1, le=MOST_TOP_K)
    min_p: float = key(0.0, "draw no token that is less likely than this times the likeliest one", ge=0, lt=1)
    repetition_penalty: float = key(1.0, "above 1: what stands in prompt and text already becomes less likely", ge=PENALTIES[0], le=PENALTIES[1])
    stop: list[str] = key([], "texts that end what is written, and are left out; ['\\n'] for the end of a line", prose=True)
    dtype: Literal["float32", "bfloat16"] = key("float32", "what the model computes in; bfloat16 on accelerators takes half the memory")


class GenerateConfig(DrawingConfig):
    """Prompts, and sampling."""

    prompt: str = key("", "text to go on from; @FILE and - read it from a file or standard input, @@ stands for one @", text=True)
    prompts: str | None = key(None, "JSON lines instead of one prompt: each has prompt (text) or messages (for a model that was taught to answer); other fields are kept")
    output: str | None = key(None, "JSON lines to write with prompts: what is there is kept, and the same command goes on", output="file")
    logprobs: int | None = key(None, "with prompts: log-probabilities of the written tokens, and of so many of the likeliest beside each", ge=0, le=20)
    slots: int = key(16, "with prompts: texts that are written at once", ge=1)
    max_tokens: int = key(128, "most tokens to write", ge=1)
    num_samples: int = key(1, "texts to write behind each prompt, each with its own random numbers", ge=1)
    temperature: float = key(0.8, "0: the likeliest token each time. A MODEL with sampling defaults of its own (generation_config.json) has them for the keys that are not given", ge=0, le=HIGHEST_TEMPERATURE)
    top_p: float = key(0.95, "draw from the likeliest tokens that together have this probability", gt=0, le=1)
    seed: int = key(0, "seed of the draws", ge=0, lt=2**32)

    @model_validator(mode="after")
    def _check(self):
        if (self.prompts is None) != (self.output is None):
            raise ValueError("prompts and output go together: a file of prompts, and the file that the texts go into")
        if self.prompts is None and self.logprobs is not None:
            raise ValueError("logprobs go into the rows of output: give prompts and output")
        if self.prompts is not None and self.prompt:
            raise ValueError("prompt and prompts: give one of them")
        if self.output is not None and (not self.output.endswith(".jsonl") or "://" in self.output):
            raise ValueError(f"output={self.output} must be a file of this machine that ends in .jsonl")
        return self
