"""An OpenAI-compatible endpoint: its address, the settings of requests, and timeouts."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from pydantic import field_validator

from ctllm_jax.config.base import Section, key

_OURS = ("messages", "model", "n", "stream")
"""Fields of a request that `body` may not set, because the client sets or relies on them."""


def check_base_url(url: str) -> str:
    """Return the URL without a trailing slash. Raises ValueError with the problem, never with a password."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError as error:
        raise ValueError(f"not a URL: {error}") from None
    if "@" in url:
        raise ValueError("must not hold a user name or password: a key goes into the environment, see api_key_env")
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError("must begin with http:// or https:// and a host, such as http://localhost:8000/v1")
    if parts.query or parts.fragment or not re.fullmatch(r"[!-~]+", url):
        raise ValueError("must end with its path, without ?, # or white space, in ASCII")
    if parts.path.rstrip("/").endswith("/chat/completions"):
        raise ValueError(f"{url} must end before /chat/completions, which is added")
    return url.rstrip("/")


class EndpointConfig(Section):
    """An endpoint that answers POST {base_url}/chat/completions."""

    base_url: str = key(..., "address of an OpenAI-compatible server up to its version, such as "
                             "http://localhost:8000/v1; a proxy is read from the environment, but not used for this machine")
    model: str = key(..., "name of the model, as the server knows it", min_length=1)
    api_key_env: str | None = key(None, "name of the environment variable that holds the key; null: none is sent")
    max_tokens: int | None = key(1024, "largest number of tokens of an answer; null: the server's limit", ge=1)
    temperature: float | None = key(None, "0: always the likeliest token; null: the server's default", ge=0)
    top_p: float | None = key(None, "sample from the likeliest tokens that together have this probability; null: the "
                                    "server's default", gt=0, le=1)
    body: dict[str, Any] = key({}, "further fields of a request, such as {top_k: 50}; null leaves out one that would "
                                   "be sent, as in {max_tokens: null, max_completion_tokens: 1024}", prose=True)
    send_seed: bool = key(False, "send a separate seed with each request; some servers refuse the field")
    timeout: float = key(120.0, "seconds that an answer may take", gt=0)
    retries: int = key(5, "times that a request is sent again after 408, 429, 5xx, a timeout or a lost connection, "
                          "after 1, 2, 4, … seconds or as Retry-After says", ge=0)
    concurrency: int = key(8, "requests at a time", ge=1)
    max_failures: int = key(20, "number of consecutive failed requests before the command stops", ge=1)

    @field_validator("base_url")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        return value if value is None else check_base_url(value)

    @field_validator("api_key_env")
    @classmethod
    def _check_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_]\w*", value, re.ASCII):
            raise ValueError("must be the name of an environment variable, such as OPENAI_API_KEY, and never the key")
        return value

    @field_validator("body")
    @classmethod
    def _check_body(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := [name for name in _OURS if name in value]:
            raise ValueError(f"must not hold {taken[0]}, which is written by the client")
        return value
