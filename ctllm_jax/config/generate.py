"""`launch.py generate MODEL`: text from a trained model."""

from __future__ import annotations

from ctllm_jax.config.base import Section, key


class GenerateConfig(Section):
    """Sampling."""

    prompt: str = key("", "text to go on from; @FILE and - read it from a file or standard input, @@ stands for one @", text=True)
    max_tokens: int = key(128, "most tokens to write", ge=1)
    num_samples: int = key(1, "texts to write, each with its own random numbers", ge=1)
    temperature: float = key(0.8, "0: the likeliest token each time", ge=0)
    top_k: int | None = key(None, "draw from this many likeliest tokens", ge=1)
    top_p: float = key(0.95, "draw from the likeliest tokens that together have this probability", gt=0, le=1)
    seed: int = key(0, "seed of the draws", ge=0)
