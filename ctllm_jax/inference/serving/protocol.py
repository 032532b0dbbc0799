"""OpenAI's completions and chat completions: conversion of request bodies to `Request`s, and of events to answers. No
jax.

An unsupported field that would change the answer is refused, not ignored.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ctllm_jax.config.control import HALF, holds_surrogate
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.generate import MOST_TOP_K, PENALTIES
from ctllm_jax.data.chat import ChatTemplate, Message
from ctllm_jax.data.tokenizer import Tokenizer
from ctllm_jax.inference.request import MOST_TOLD, Event, Request, Token

MOST_CHOICES = 128
"""Largest number of texts per request."""
MOST_STOPS = 16
LONGEST_STOP = 1024
"""Characters of a stop text: each new token is compared with all of them."""
MOST_MESSAGES = 2048
_DEFAULT_TOKENS = 16
"""Default of max_tokens for completions, as in OpenAI's API."""


class ProtocolError(Exception):
    """An error answer: HTTP status, message, and the field that it concerns."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's format."""
        kind = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        return {"error": {"message": str(self), "type": kind.get(self.status, "invalid_request_error"),
                          "param": self.param, "code": self.code}}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class _Common(BaseModel):
    # Numbers have OpenAI's ranges if it defines them, and fit the engine's dtypes.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-2**63, lt=2**63)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    # Beyond OpenAI's, named as vLLM names them.
    top_k: int | None = Field(None, ge=-1, le=MOST_TOP_K)
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, ge=PENALTIES[0], le=PENALTIES[1])
    # Fields that do not change the text.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    # Fields that would: accepted only with their neutral value.
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    def stops(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS:
            raise ProtocolError(400, f"stop: at most {MOST_STOPS} texts", param="stop")
        if max(map(len, stops), default=0) > LONGEST_STOP:
            raise ProtocolError(400, f"stop: at most {LONGEST_STOP:,} characters in a text", param="stop")
        return tuple(filter(None, stops))


class _Completions(_Common):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MOST_TOLD)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES)
    suffix: None = None


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: str = Field(pattern="^text$")
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    role: str
    content: str | list[_Content]
    # Fields that our templates do not support: accepted only with their neutral value.
    tool_calls: list[Any] | None = Field(None, max_length=0)
    function_call: None = None
    audio: None = None


class _ResponseFormat(BaseModel):
    type: str = Field(pattern="^text$")


class _Chat(_Common):
    messages: list[_Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    # OpenAI's chat generates at least one token; 0 does not mean "no limit".
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOLD)
    response_format: _ResponseFormat | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    parallel_tool_calls: Any = None


@dataclass(frozen=True)
class Served:
    """The context for reading requests: the model's name, tokenizer and template, and its limits."""

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    prefix_id: int | None
    eod_id: int | None
    stop_ids: tuple[int, ...]
    max_length: int
    max_tokens: int | None = None
    drawing: dict[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass
class Answer:
    """One request of a client: the engine's requests for it, and the format of the answer.

    Attributes:
      requests: one per choice.
      stream: send events as they arrive, or one answer.
    """

    served: Served
    is_chat: bool
    requests: list[Request]
    prompts: list[str]
    hidden: int
    n: int
    stream: bool
    include_usage: bool
    echo: bool
    logprobs: bool

    def __post_init__(self):
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._begun: set[int] = set()
        self._offsets = [0] * len(self.requests)
        self.generated = 0

    def whole(self, events: Sequence[Sequence[Event]]) -> dict[str, Any]:
        """The body, from all events of each choice."""
        choices = []
        for index, each in enumerate(events):
            text = "".join(event.text for event in each)
            tokens = [token for event in each for token in event.tokens]
            self.generated += len(tokens)
            prompt = next((event.prompt for event in each if event.prompt is not None), None)
            choice = {"index": index, "finish_reason": each[-1].finish,
                      "logprobs": self._logprobs(index, tokens, prompt)}
            if self.is_chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = (self.prompts[index // self.n] if self.echo else "") + text
            choices.append(choice)
        return {**self._head(), "choices": choices, "usage": self.usage()}

    def chunks(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """The streamed chunk of an event."""
        self.generated += len(event.tokens)
        first = index not in self._begun
        self._begun.add(index)
        text = event.text
        if self.echo and first:
            text = self.prompts[index // self.n] + text
        logprobs = self._logprobs(index, event.tokens, event.prompt)
        if not (text or logprobs or event.finish or self.is_chat and first):
            return
        choice: dict[str, Any] = {"index": index, "finish_reason": event.finish, "logprobs": logprobs}
        if self.is_chat:
            choice["delta"] = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        else:
            choice["text"] = text
        yield {**self._head(chunk=True), "choices": [choice]} | ({"usage": None} if self.include_usage else {})

    def last_chunk(self) -> dict[str, Any] | None:
        """The usage chunk at the end of a stream, if requested."""
        return {**self._head(chunk=True), "choices": [], "usage": self.usage()} if self.include_usage else None

    def usage(self) -> dict[str, int]:
        """Tokens read and written."""
        read = sum(len(request.prompt) for request in self.requests[::self.n])
        return {"prompt_tokens": read, "completion_tokens": self.generated, "total_tokens": read + self.generated}

    def _head(self, *, chunk: bool = False) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.served.name}

    def _logprobs(self, index: int, tokens: Sequence[Token], prompt: Sequence[Token] | None) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        told = self.requests[index].told
        if self.is_chat:
            return {"content": [self._entry(token.id, token.logp, token.told) for token in tokens], "refusal": None} \
                if tokens else None
        tokens = [*(prompt[self.hidden:] if prompt and self.echo else ()), *tokens]
        if not tokens:
            return None
        names, offsets = [name_of(self.served.tokenizer, token.id) for token in tokens], []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self.served.tokenizer.id_bytes(token.id).decode(errors="ignore"))
        # As in OpenAI's API, the sampled token is included even if it is not among the likeliest.
        likeliest = [token.logp is not None and {name_of(self.served.tokenizer, each): logp for each, logp in
                                                 (*token.told[:told], (token.id, token.logp))} or None
                     for token in tokens]
        return {"tokens": names, "token_logprobs": [token.logp for token in tokens],
                "top_logprobs": likeliest if told else None, "text_offset": offsets}

    def _entry(self, token: int, logp: float, told: Sequence[tuple[int, float]] | None = None) -> dict[str, Any]:
        entry = {"token": name_of(self.served.tokenizer, token), "logprob": logp,
                 "bytes": list(self.served.tokenizer.id_bytes(token))}
        return entry if told is None else entry | {"top_logprobs": [self._entry(*each) for each in told]}


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """A token as text: its bytes if they are not whole characters, its piece if it has no text."""
    content = tokenizer.id_bytes(token)
    try:
        return content.decode() or tokenizer.id_name(token)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def read_completions(served: Served, body: bytes) -> Answer:
    """Read a body of /v1/completions. Raises ProtocolError if it is malformed or unsupported."""
    asked = _parse(_Completions, served, body)
    n = asked.n or 1
    if asked.best_of not in (None, n):
        raise ProtocolError(400, "best_of: only as many as n", param="best_of")
    given = asked.prompt
    given = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    if not given or len(given) * n > MOST_CHOICES:
        raise ProtocolError(400, f"prompt: from 1 to {MOST_CHOICES} texts in all, n of each", param="prompt")
    # A text gets the id that precedes documents in training, which is not reported; ids are used unchanged.
    hidden = int(served.prefix_id is not None and isinstance(given[0], str) and given[0] != "")
    rows, texts = [], []
    for prompt in given:
        if isinstance(prompt, str):
            ids = served.tokenizer.encode(prompt)
            prefix = served.prefix_id if ids or served.prefix_id is not None else served.eod_id
            rows.append([*([] if prefix is None else [prefix]), *ids])
            texts.append(prompt)
        else:
            rows.append(prompt)
            texts.append(served.tokenizer.decode(prompt) if prompt else "")
    if not all(rows):
        raise ProtocolError(400, "prompt is empty, and this model has no id that begins a document", param="prompt")
    most = _DEFAULT_TOKENS if asked.max_tokens is None else asked.max_tokens
    echo = bool(asked.echo)
    if most == 0 and not echo:
        raise ProtocolError(400, "max_tokens=0 only with echo", param="max_tokens")
    if most == 0 and asked.logprobs is None:
        raise ProtocolError(400, "max_tokens=0 needs logprobs; otherwise the answer would be empty", param="max_tokens")
    requests = _requests(served, asked, rows, most=most, told=asked.logprobs or 0, n=n,
                         score_prompt=echo and asked.logprobs is not None)
    return Answer(served, False, requests, texts, hidden, n, bool(asked.stream), _wants_usage(asked), echo,
                  asked.logprobs is not None)


def read_chat(served: Served, body: bytes) -> Answer:
    """Read a body of /v1/chat/completions. Raises ProtocolError if it is malformed or unsupported."""
    asked = _parse(_Chat, served, body)
    if served.template is None:
        raise ProtocolError(400, f"{served.name} was not taught to answer: it has no chat template. Ask "
                                 "/v1/completions", param="model")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ProtocolError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
    messages = [Message("system" if each.role == "developer" else each.role, each.content if isinstance(
        each.content, str) else "".join(part.text for part in each.content)) for each in asked.messages]
    try:
        ids = served.template.prompt_ids(messages)
    except UserError as error:
        raise ProtocolError(400, str(error), param="messages") from None
    room = served.max_length - len(ids)
    if room < 1:
        raise _too_long(served, len(ids), 1)
    given = asked.max_completion_tokens or asked.max_tokens
    most = given or min(room, served.max_tokens or room)
    n = asked.n or 1
    requests = _requests(served, asked, [ids], most=most, told=asked.top_logprobs or 0, n=n)
    return Answer(served, True, requests, [""], 0, n, bool(asked.stream), _wants_usage(asked), False,
                  bool(asked.logprobs))


def _parse(schema: type[_Common], served: Served, body: bytes) -> Any:
    try:
        content = json.loads(body)
        is_broken = holds_surrogate(content)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(400, f"the body is not JSON: {error}") from None
    if is_broken:
        fields = content.items() if isinstance(content, dict) else ()
        field = next((name for name, value in fields if holds_surrogate(value)), "body")
        raise ProtocolError(400, f"{field}: a text holds {HALF}", param=field)
    try:
        asked = schema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = [str(part) for part in first["loc"]]
        refused = first["type"] in ("extra_forbidden", "none_required") or first.get("ctx", {}).get("max_length") == 0
        words = "is not supported" if refused else first["msg"]
        raise ProtocolError(400, f"{'.'.join(place) or 'body'}: {words}", param=place[0] if place else None) from None
    if asked.model != served.name:
        raise ProtocolError(404, f"no model {asked.model!r}: there is {served.name!r}", param="model",
                            code="model_not_found")
    return asked


def _requests(served: Served, asked: _Common, rows: Sequence[Sequence[int]], *, most: int, n: int,
              **more: Any) -> list[Request]:
    for ids in rows:
        if len(ids) + most > served.max_length:
            raise _too_long(served, len(ids), most)
    if served.max_tokens is not None and most > served.max_tokens:
        raise ProtocolError(400, f"max_tokens={most}: at most {served.max_tokens} here", param="max_tokens")
    seed = int.from_bytes(os.urandom(8), "little") if asked.seed is None else asked.seed
    # Sampling fields that a request omits have the defaults of the model's generation_config.json, as in vLLM.
    given = {name: getattr(asked, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
    drawing = {"temperature": 1.0} | served.drawing | {name: each for name, each in given.items() if each is not None}
    drawing["top_k"] = None if (drawing.get("top_k") or 0) < 1 else drawing["top_k"]
    drawing["stop"] = tuple(drawing.get("stop", ())) if asked.stop is None else asked.stops()
    return [Request(prompt=tuple(ids), max_tokens=most, seed=seed, row=row, stop_ids=served.stop_ids, **drawing, **more)
            for ids in rows for row in range(n)]


def _wants_usage(asked: _Common) -> bool:
    return bool(asked.stream and asked.stream_options and asked.stream_options.include_usage)


def _too_long(served: Served, prompt: int, most: int) -> ProtocolError:
    return ProtocolError(400, f"the model's context is {served.max_length} tokens: a prompt of {prompt} and "
                              f"{most} new ones are more", param="messages", code="context_length_exceeded")
