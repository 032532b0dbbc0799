"""`launch.py serve MODEL`: an OpenAI-compatible server for a model."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator

from ctllm_jax.config.base import Section, key
from ctllm_jax.config.model import MeshConfig
from ctllm_jax.config.sft import TemplateConfig


class ServeConfig(Section):
    """Address, limits and concurrency of the server."""

    host: str = key("127.0.0.1", "address to listen at; any but this machine's own needs an API key", min_length=1)
    port: int = key(8000, "port to listen at; 0: any that is free", ge=0, le=65535)
    api_key_env: str = key("CTLLM_API_KEY", "name of the environment variable that holds the API key; where it is set, requests need it")
    name: str | None = key(None, "what the model is called; null: the last part of MODEL", min_length=1)
    template: TemplateConfig | None = key(None, "how messages become ids, for a model that has learned no template; null: the one that it has learned")
    dtype: Literal["float32", "bfloat16"] = key("float32", "what the model computes in; bfloat16 on accelerators takes half the memory")
    mesh: MeshConfig | None = key(None, "devices that the model is split over, such as {tensor: 4}; null: it lies on the first one")
    slots: int = key(8, "requests that are worked on at once; each takes cache for max_length tokens", ge=1)
    max_length: int | None = key(None, "most tokens of prompt and answer together; null: the model's context", ge=2)
    max_tokens: int | None = key(None, "most new tokens that a request may ask for; null: what max_length leaves", ge=1)
    max_queue: int = key(64, "requests that may wait for a slot; more are answered with 429", ge=0)
    max_body: int = key(2**20, "bytes of a request; larger ones are answered with 413", ge=1)
    max_connections: int = key(256, "connections at once; one more closes the one that has waited longest for a request, or is answered with 503", ge=1)
    timeout: float = key(600.0, "seconds that an answer may take, waiting included; then 408", gt=0)
    read_timeout: float = key(20.0, "seconds in which the head of a request must have arrived, and then its body, or 408; and in which a client must take what was sent", gt=0)
    steps: int = key(4, "tokens that are drawn before they are sent: more of them cost less, and come in bursts", ge=1)

    @field_validator("api_key_env")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_]\w*", value, re.ASCII):
            raise ValueError("must be the name of an environment variable, such as CTLLM_API_KEY, and never the key")
        return value
