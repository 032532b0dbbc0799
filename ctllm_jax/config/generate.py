"""`launch.py generate MODEL`: text from a trained model."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ctllm_jax.config.base import Section, key

HIGHEST_TEMPERATURE = 100.0
MOST_TOP_K = 2**31 - 1
PENALTIES = (0.01, 100.0)
"""Bounds of sampling settings, inside which nothing overflows in float32 and int32."""


class DrawingConfig(Section):
    """Sampling settings for all generated text."""

    top_k: int | None = key(None, "sample from this many likeliest tokens", ge=1, le=MOST_TOP_K)
    min_p: float = key(0.0, "exclude tokens that are less likely than this factor times the likeliest one", ge=0, lt=1)
    repetition_penalty: float = key(1.0, "above 1: tokens of prompt and text become less likely", ge=PENALTIES[0], le=PENALTIES[1])
    stop: list[str] = key([], "texts that end the output, and are left out; ['\\n'] for the end of a line", prose=True)
    dtype: Literal["float32", "bfloat16"] = key("float32", "dtype of computation; bfloat16 on accelerators needs half the memory")


class GenerateConfig(DrawingConfig):
    """Prompts, and sampling."""

    prompt: str = key("", "text to continue; @FILE and - read it from a file or standard input, @@ means a literal @", text=True)
    prompts: str | None = key(None, "JSON lines instead of one prompt: each has prompt (text) or messages (for a model trained on dialogues); other fields are kept")
    output: str | None = key(None, "JSON lines to write with prompts: existing lines are kept, and the same command continues", output="file")
    logprobs: int | None = key(None, "with prompts: report log-probabilities of the generated tokens, and of this many likeliest tokens at each position", ge=0, le=20)
    slots: int = key(16, "with prompts: number of texts generated at once", ge=1)
    max_tokens: int = key(128, "largest number of new tokens", ge=1)
    num_samples: int = key(1, "number of texts for each prompt, each with its own random numbers", ge=1)
    temperature: float = key(0.8, "0: always the likeliest token. If a MODEL has sampling defaults (generation_config.json), they apply to keys that are not given", ge=0, le=HIGHEST_TEMPERATURE)
    top_p: float = key(0.95, "sample from the likeliest tokens that together have this probability", gt=0, le=1)
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
