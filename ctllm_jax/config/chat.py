"""`launch.py chat MODEL`: a dialogue with a model."""

from __future__ import annotations

from ctllm_jax.config.base import key
from ctllm_jax.config.generate import HIGHEST_TEMPERATURE, DrawingConfig
from ctllm_jax.config.sft import TemplateConfig


class ChatConfig(DrawingConfig):
    """Sampling, and how the dialogue begins."""

    template: TemplateConfig | None = key(None, "how messages become ids, for a model that has learned no template; null: the one that it has learned")
    system: str | None = key(None, "system prompt; null: the one of the model's template", text=True)
    max_tokens: int = key(512, "most tokens of an answer", ge=1)
    temperature: float = key(0.7, "0: the likeliest token each time. A MODEL with sampling defaults of its own (generation_config.json) has them for the keys that are not given", ge=0, le=HIGHEST_TEMPERATURE)
    top_p: float = key(0.9, "draw from the likeliest tokens that together have this probability", gt=0, le=1)
    seed: int = key(0, "seed of the draws; it rises by one with each answer", ge=0, lt=2**31)
