"""Messages to ids: one template object for training, chat, evaluation and export. No jax here.

A template is a table: what stands before, at the end of, and after the text of each role. Markers are ids, and the
text between them is tokenized on its own, so which token belongs to an answer is known and never searched for, and a
marker that a user types is text.

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
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data.tokenizer import Tokenizer
from ctllm_jax.data.vocabulary import Vocabulary

ROLES = ("system", "user", "assistant")
LOSS_ON = ("answers", "last_answer", "everything")
_IM_START, _IM_END = "<|im_start|>", "<|im_end|>"


class Message(NamedTuple):
    """What one side says. `weight` scales the loss of its tokens; 0 leaves an answer out of it."""

    role: str
    content: str
    weight: float = 1.0


class Rendered(NamedTuple):
    """A dialogue: ids int32 [T]; weights float32 [T], how much each id counts as a target, 0 where it does not."""

    ids: np.ndarray
    weights: np.ndarray


class Part(NamedTuple):
    """A stretch of a dialogue: given ids, or (`ids` None) a text still to be tokenized. `message` is -1 outside all."""

    ids: tuple[int, ...] | None
    text: str
    message: int
    is_answer: bool


class Turn(NamedTuple):
    """What stands around a role's text, each as markers (ids) and texts; an answer's `end` is learned, `after` not."""

    before: tuple[int | str, ...] = ()
    end: tuple[int | str, ...] = ()
    after: tuple[int | str, ...] = ()


class ChatTemplate(ABC):
    """Messages to ids and loss weights, by construction. `open_template` makes one."""

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
        """Added tokens that an assistant's text may hold; in other texts, which anybody types, they stay text."""

    @cached_property
    def _answers(self) -> tuple[re.Pattern[str], Tokenizer]:
        """What finds the name of an added token in an assistant's text, and the encoder that gives its id."""
        spoken = self._spoken()
        names = "|".join(map(re.escape, spoken.values()))
        return re.compile(names or "(?!)"), self._vocabulary.text_encoder(self._markers, spoken)

    def render(self, messages: Sequence[Message], *, loss_on: str = "answers") -> Rendered:
        """A whole dialogue. UserError where roles are unknown or stand where the template has no place for them."""
        return self.render_many([messages], loss_on=loss_on)[0]

    def render_many(self, dialogues: Sequence[Sequence[Message]], *, loss_on: str = "answers") -> list[Rendered]:
        """Each dialogue as `render` gives it; their texts are tokenized together."""
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
        """Ids that an answer to these messages goes on from: what stands before that answer in training, id for id."""
        if messages and messages[-1].role == "assistant":
            raise UserError("the last message of a prompt is the assistant's: end with what is to be answered")
        completed = self._completed(messages)
        parts = self._parts(completed, prompt=True)
        texts = iter(self._encode_parts([(completed, part) for part in parts]))
        return [token for part in parts for token in (part.ids if part.ids is not None else next(texts))]

    def stretches(self, messages: Sequence[Message]) -> list[tuple[int, ...] | str]:
        """What `prompt_ids` is made of: ids, and texts that are tokenized each on its own (`encode_texts`).

        Where the last message is the assistant's, it ends with that text: an answer to be gone on with.
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
        """Ids of texts as they stand within a dialogue. UserError where one would hold a marker."""
        return self._encode(list(texts))

    def fingerprint(self) -> str:
        """Hash of all that decides the ids of a dialogue but the tokenizer's treatment of its texts."""
        return hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()

    @property
    def markers(self) -> frozenset[int]:
        """Ids that are no text: those that a dialogue is held together by."""
        return self._markers

    def marker_names(self) -> dict[int, str]:
        """What to call the ids that are no text: the role that one stands before, or its piece."""
        ids = [*self._markers, *self.stop_ids]
        return {marker: self._vocabulary.pieces.get(marker, f"id {marker}") for marker in ids}

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids, spaces at its ends included; markers have none."""
        return self._encoder.decode(ids)

    @abstractmethod
    def to_jinja(self) -> str:
        """The template as Hugging Face reads it, answers inside {% generation %}.

        It gives the same ids and mask where the names of markers are special tokens there, no message holds such a
        name, and the tokenizer joins no text of the template with a text of a message: Hugging Face tokenizes them as
        one, we do not.
        """

    @abstractmethod
    def _parts(self, messages: Sequence[Message], *, prompt: bool) -> list[Part]:
        """The stretches of a dialogue, or of the prompt for the next answer."""

    @abstractmethod
    def _identity(self) -> Any:
        """What `fingerprint` hashes, as JSON."""

    def _completed(self, messages: Sequence[Message]) -> list[Message]:
        """With the system prompt, and checked."""
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
        """Whether a part is an assistant's text with the name of an added token in it."""
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


class TableTemplate(ChatTemplate):
    """A template that is a `Turn` for each role. Texts of the table are tokenized once, apart from the messages'."""

    def __init__(self, kind: str, vocabulary: Vocabulary, turns: dict[str, Turn], *, system: str | None,
                 begin: tuple[int, ...] = ()):
        named = [*begin, *(item for turn in turns.values() for stretch in turn for item in stretch)]
        super().__init__(vocabulary, [item for item in named if isinstance(item, int)])
        self.kind = kind
        self.system = system
        self._turns = turns
        self._begin = begin
        self._table = {role: [self._literal(stretch) for stretch in turn] for role, turn in turns.items()}
        ends = [item for item in turns["assistant"].end if isinstance(item, int)]
        eos = vocabulary.tokenizer.eos_id
        self.stop_ids = tuple(dict.fromkeys(ends + ([] if eos is None else [eos])))

    def to_jinja(self) -> str:
        """See `ChatTemplate`. UserError where a marker has no name: an id beyond the tokenizer's pieces."""
        def write(*stretch: int | str) -> str:
            text = "".join(item if isinstance(item, str) else self._name(item) for item in stretch)
            return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""

        system, user, assistant = (self._turns[role] for role in ROLES)
        refuse = "{{ raise_exception(%s) }}"
        content = "{{ message['content'] }}"
        begin = write(*self._begin)
        if self.system is not None:
            prompt = write(*system.before, self.system, *system.end, *system.after)
            begin += "{% if messages[0]['role'] != 'system' %}" + prompt + "{% endif %}"
        return "".join([
            begin, "{% for message in messages %}{% if message['role'] == 'system' %}{% if not loop.first %}",
            refuse % "'only the first message may be a system prompt'", "{% endif %}",
            write(*system.before), content, write(*system.end, *system.after),
            "{% elif message['role'] == 'user' %}", write(*user.before), content, write(*user.end, *user.after),
            "{% elif message['role'] == 'assistant' %}", write(*assistant.before), "{% generation %}", content,
            write(*assistant.end), "{% endgeneration %}", write(*assistant.after),
            "{% else %}", refuse % "'unknown role: ' + message['role']", "{% endif %}{% endfor %}",
            "{% if add_generation_prompt %}", write(*assistant.before), "{% endif %}"])

    def marker_names(self) -> dict[int, str]:
        """See `ChatTemplate`."""
        before = {role: {item for item in turn.before if isinstance(item, int)} for role, turn in self._turns.items()}
        roles = {marker: role for role, own in before.items() for marker in own
                 if sum(marker in other for other in before.values()) == 1}
        return super().marker_names() | roles

    def _parts(self, messages: Sequence[Message], *, prompt: bool) -> list[Part]:
        parts = [Part(self._begin, "", -1, False)]
        for index, message in enumerate(messages):
            before, end, after = self._table[message.role]
            is_answer = message.role == "assistant"
            parts += [Part(before, "", index, False), Part(None, message.content, index, is_answer),
                      Part(end, "", index, is_answer), Part(after, "", index, False)]
        if prompt:
            parts.append(Part(self._table["assistant"][0], "", -1, False))
        return parts

    def _spoken(self) -> dict[int, str]:
        spoken = self._vocabulary.spoken_tokens({*self._markers, *self.stop_ids})
        # The special ones are markers of other templates, as far as this one can know.
        return {index: name for index, name in spoken.items() if not self._vocabulary.is_special(index)}

    def _identity(self) -> Any:
        return {"kind": self.kind, "begin": self._begin, "system": self.system, "table": self._table}

    def _literal(self, stretch: tuple[int | str, ...]) -> tuple[int, ...]:
        ids: list[int] = []
        for item in stretch:
            ids += [item] if isinstance(item, int) else self._encode([item])[0]
        return tuple(ids)

    def _name(self, marker: int) -> str:
        if marker not in self._vocabulary.pieces:
            raise UserError(f"template {self.kind} cannot be exported: id {marker} is no piece of "
                            f"{self._vocabulary.tokenizer.path}")
        return self._vocabulary.pieces[marker]


def open_template(config: TemplateConfig, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a config. UserError where the tokenizer lacks a marker, or a text could hold it."""
    vocabulary = Vocabulary(tokenizer)
    if config.kind == "jinja":
        from ctllm_jax.data.jinja_chat import JinjaTemplate

        return JinjaTemplate(config, vocabulary)
    begin: tuple[int, ...] = ()
    if config.add_bos:
        if tokenizer.bos_id is None:
            raise UserError(f"template.add_bos=true, but {tokenizer.path} has no BOS: leave it out")
        begin = (tokenizer.bos_id,)
    if config.kind == "chatml" and _IM_START in vocabulary.ids and _IM_END in vocabulary.ids:
        start, end = vocabulary.ids[_IM_START], vocabulary.ids[_IM_END]
        turns = {role: Turn((start, f"{role}\n"), (end,), ("\n",)) for role in ROLES}
        return TableTemplate("chatml", vocabulary, turns, system=config.system, begin=begin)
    end = tokenizer.eos_id if config.end_id is None else config.end_id
    if end is None:
        raise UserError(f"template.end_id must be given: {tokenizer.path} has no EOS to end an answer with")
    vocabulary.check_marker(end, "template.end_id")
    if config.kind == "chatml":
        # Names that are only text could also be typed: an answer's end is told by an id.
        turns = {role: Turn((f"{_IM_START}{role}\n",), (_IM_END,), ("\n",)) for role in ROLES}
        turns["assistant"] = turns["assistant"]._replace(end=(_IM_END, end))
    elif config.kind == "plain":
        cut = {role: getattr(config, f"plain_{role}").split("{content}") for role in ROLES}
        turns = {role: Turn((before,), (end,) if role == "assistant" else (), (after,))
                 for role, (before, after) in cut.items()}
    else:
        vocabulary.check_marker(config.user_id, "template.user_id")
        vocabulary.check_marker(config.assistant_id, "template.assistant_id")
        if len({config.user_id, config.assistant_id, end}) < 3:
            raise UserError(f"template.user_id={config.user_id}, assistant_id={config.assistant_id} and the end of an "
                            f"answer ({end}) must be three different ids")
        turns = {"system": Turn(), "user": Turn((config.user_id,)), "assistant": Turn((config.assistant_id,), (end,))}
    return TableTemplate(config.kind, vocabulary, turns, system=config.system, begin=begin)
