"""`launch.py chat MODEL`: a dialogue with a model."""

from __future__ import annotations

from ctllm_jax.config.base import key
from ctllm_jax.config.generate import HIGHEST_TEMPERATURE, DrawingConfig
from ctllm_jax.config.sft import TemplateConfig


class ChatConfig(DrawingConfig):
    """Sampling, and the beginning of the dialogue."""

    template: TemplateConfig | None = key(None, "chat template for a model that was trained without one; null: the model's own")
    system: str | None = key(None, "system prompt; null: the one of the model's template", text=True)
    max_tokens: int = key(512, "largest number of tokens of an answer", ge=1)
    temperature: float = key(0.7, "0: always the likeliest token. If a MODEL has sampling defaults (generation_config.json), they apply to keys that are not given", ge=0, le=HIGHEST_TEMPERATURE)
    top_p: float = key(0.9, "sample from the likeliest tokens that together have this probability", gt=0, le=1)
    seed: int = key(0, "random seed; it increases by one with each answer", ge=0, lt=2**31)
