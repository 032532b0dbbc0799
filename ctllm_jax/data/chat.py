"""Convert messages to ids: one template object for training, chat, evaluation and export. No jax.

A template is a table of what precedes, ends and follows the text of each role. Markers are ids, and the text between
them is tokenized separately. So the tokens of an answer are known without a search, and a marker that a user types
stays text.

T tokens of a dialogue.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ctllm_jax.config.errors import UserError
from ctllm_jax.data.tokenizer import Tokenizer
from ctllm_jax.data.vocabulary import Vocabulary

ROLES = ("system", "user", "assistant")
LOSS_ON = ("answers", "last_answer", "everything")


class Message(NamedTuple):
    """A message of one role. `weight` scales the loss of its tokens; 0 excludes an answer from the loss."""

    role: str
    content: str
    weight: float = 1.0


class Rendered(NamedTuple):
    """A dialogue: ids int32 [T]; weights float32 [T], the weight of each id as a target."""

    ids: np.ndarray
    weights: np.ndarray


class Part(NamedTuple):
    """A part of a dialogue: ids, or (`ids` None) a text to tokenize. `message` is -1 outside all messages."""

    ids: tuple[int, ...] | None
    text: str
    message: int
    is_answer: bool


class ChatTemplate(ABC):
    """Messages to ids and loss weights, by construction. `templates.open_template` makes one."""

    kind: str
    system: str | None
    stop_ids: tuple[int, ...]
    """Ids that end an answer."""

    def __init__(self, vocabulary: Vocabulary, markers: Iterable[int]):
        self._vocabulary = vocabulary
        self._markers = frozenset(markers)
        self._encoder = vocabulary.text_encoder(self._markers)

    @abstractmethod
    def _spoken(self) -> dict[int, str]:
        """Added tokens that an assistant's text may contain; in other texts, which users type, they stay text."""

    @cached_property
    def _answers(self) -> tuple[re.Pattern[str], Tokenizer]:
        """A pattern for names of added tokens in an assistant's text, and the encoder that gives their ids."""
        spoken = self._spoken()
        names = "|".join(map(re.escape, spoken.values()))
        return re.compile(names or "(?!)"), self._vocabulary.text_encoder(self._markers, spoken)

    def render(self, messages: Sequence[Message], *, loss_on: str = "answers") -> Rendered:
        """Render a whole dialogue. Raises UserError for unknown roles, and for roles in a place that the template does
        not allow."""
        return self.render_many([messages], loss_on=loss_on)[0]

    def render_many(self, dialogues: Sequence[Sequence[Message]], *, loss_on: str = "answers") -> list[Rendered]:
        """Render several dialogues, tokenizing their texts together."""
        if loss_on not in LOSS_ON:
            raise UserError(f"loss_on={loss_on!r} must be one of {', '.join(LOSS_ON)}")
        completed = [self._completed(messages) for messages in dialogues]
        parts = [self._parts(messages, prompt=False) for messages in completed]
        texts = iter(self._encode_parts([(messages, part) for messages, each in zip(completed, parts, strict=True)
                                         for part in each]))
        rendered = []
        for messages, each in zip(completed, parts, strict=True):
            last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=-1)
            ids, weights = [], []
            for part in each:
                new = part.ids if part.ids is not None else next(texts)
                learned = loss_on == "everything" or part.is_answer and (loss_on == "answers" or part.message == last)
                weight = messages[part.message].weight if part.message >= 0 else 1.0
                ids += new
                weights += [weight if learned else 0.0] * len(new)
            rendered.append(Rendered(np.asarray(ids, np.int32), np.asarray(weights, np.float32)))
        return rendered

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt for an answer to these messages: exactly the ids that precede that answer in training."""
        if messages and messages[-1].role == "assistant":
            raise UserError("the last message of a prompt is the assistant's: end with the message to be answered")
        completed = self._completed(messages)
        parts = self._parts(completed, prompt=True)
        texts = iter(self._encode_parts([(completed, part) for part in parts]))
        return [token for part in parts for token in (part.ids if part.ids is not None else next(texts))]

    def stretches(self, messages: Sequence[Message]) -> list[tuple[int, ...] | str]:
        """The parts of `prompt_ids`: ids, and texts that are tokenized separately (`encode_texts`).

        If the last message is the assistant's, the parts end with its text, as an answer to continue.
        """
        completed = self._completed(messages)
        goes_on = completed[-1].role == "assistant"
        parts = self._parts(completed, prompt=not goes_on)
        if goes_on:
            last = max(index for index, part in enumerate(parts) if part.ids is None and part.is_answer)
            parts = parts[:last + 1]
        said = [self._says_tokens(completed, part) for part in parts]
        return [part.ids if part.ids is not None else tuple(self._answers[1].encode(part.text)) if tokens else part.text
                for part, tokens in zip(parts, said, strict=True) if part.text or part.ids]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts inside a dialogue. Raises UserError if one would contain a marker."""
        return self._encode(list(texts))

    def fingerprint(self) -> str:
        """Hash of everything that determines the ids of a dialogue, except the tokenizer."""
        return hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()

    @property
    def markers(self) -> frozenset[int]:
        """Ids of structural tokens, which are not text."""
        return self._markers

    def marker_names(self) -> dict[int, str]:
        """Names of structural tokens: the role that one precedes, or its piece."""
        ids = [*self._markers, *self.stop_ids]
        return {marker: self._vocabulary.pieces.get(marker, f"id {marker}") for marker in ids}

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids, including spaces at its ends; markers have no text."""
        return self._encoder.decode(ids)

    @abstractmethod
    def to_jinja(self) -> str:
        """The template in Hugging Face's format, with answers inside {% generation %}.

        It gives the same ids and mask if the names of markers are special tokens there, no message contains such a
        name, and the tokenizer does not join text of the template with text of a message: Hugging Face tokenizes them
        together, we do not.
        """

    @abstractmethod
    def _parts(self, messages: Sequence[Message], *, prompt: bool) -> list[Part]:
        """The parts of a dialogue, or of the prompt for the next answer."""

    @abstractmethod
    def _identity(self) -> Any:
        """The input of `fingerprint`, as JSON."""

    def _completed(self, messages: Sequence[Message]) -> list[Message]:
        """Add the system prompt, and check the roles."""
        for index, message in enumerate(messages):
            if message.role not in ROLES:
                raise UserError(f"messages[{index}].role={message.role!r} must be one of {', '.join(ROLES)}")
            if message.role == "system" and index:
                raise UserError(f"messages[{index}] is a system prompt; only the first message may be one")
        if not messages:
            raise UserError("messages is empty: a dialogue needs at least one")
        has_none = self.system is not None and messages[0].role != "system"
        return [Message("system", self.system), *messages] if has_none else list(messages)

    def _encode_parts(self, parts: Sequence[tuple[Sequence[Message], Part]]) -> list[list[int]]:
        """Ids of the texts among parts of dialogues."""
        texts = [(messages, part) for messages, part in parts if part.ids is None]
        encoded = self._encode([part.text for _, part in texts])
        for index, (messages, part) in enumerate(texts):
            if self._says_tokens(messages, part):
                encoded[index] = self._answers[1].encode(part.text)
        return encoded

    def _says_tokens(self, messages: Sequence[Message], part: Part) -> bool:
        """Whether a part is an assistant's text that contains the name of an added token."""
        return (part.ids is None and part.message >= 0 and messages[part.message].role == "assistant"
                and self._answers[0].search(part.text) is not None)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoded = self._encoder.encode_batch(texts) if texts else []
        for text, ids in zip(texts, encoded, strict=True):
            if not self._markers.isdisjoint(ids):
                marker = next(iter(self._markers.intersection(ids)))
                raise UserError(f"{self._vocabulary.tokenizer.path} gives the text {text[:80]!r} the id {marker}, a "
                                f"marker of template {self.kind}: choose a marker that no text can hold")
        return encoded
