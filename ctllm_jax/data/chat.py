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
from typing import Any, NamedTuple

import numpy as np

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer

ROLES = ("system", "user", "assistant")
LOSS_ON = ("answers", "last_answer", "everything")
_IM_START, _IM_END = "<|im_start|>", "<|im_end|>"
_LOOKS_SPECIAL = re.compile(r"<.+>|\[/?[A-Z_]+\]", re.DOTALL)
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6  # types of a SentencePiece piece


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


class Vocabulary:
    """The pieces of a tokenizer by name, and the encoder of texts that gives no marker."""

    def __init__(self, tokenizer: Tokenizer):
        self._content = tokenizer.path.read_bytes()
        if hashlib.sha256(self._content).hexdigest() != tokenizer.sha256:
            raise UserError(f"{tokenizer.path} changed while it was in use")
        self.tokenizer = tokenizer
        self._types: dict[int, int] = {}
        self._added: dict[str, bool] = {}
        if isinstance(tokenizer, SentencePieceTokenizer):
            self.pieces = {index: piece.piece for index, piece in enumerate(self._proto().pieces)}
            self._types = {index: piece.type for index, piece in enumerate(self._proto().pieces)}
        else:
            spec = json.loads(self._content)
            vocab = spec["model"]["vocab"]
            items = vocab.items() if isinstance(vocab, dict) else ((entry[0], n) for n, entry in enumerate(vocab))
            self.pieces = {index: piece for piece, index in items}
            self.pieces |= {token["id"]: token["content"] for token in spec.get("added_tokens", ())}
            self._added = {token["content"]: token["special"] for token in spec.get("added_tokens", ())}
        self.ids = {piece: index for index, piece in self.pieces.items()}

    def special_tokens(self) -> dict[str, int]:
        """Name -> id of the pieces that are no text."""
        special = {piece: index for index, piece in self.pieces.items() if self._types.get(index) == _CONTROL}
        special |= {piece: self.ids[piece] for piece, is_special in self._added.items() if is_special}
        named = {index for index, kind in self._types.items() if kind == _USER_DEFINED} | {
            self.ids[piece] for piece in self._added}
        return special | {self.pieces[index]: index for index in named if _LOOKS_SPECIAL.fullmatch(self.pieces[index])}

    def check_marker(self, marker: int, name: str) -> None:
        """UserError where a text could hold this id, or would lose a piece to it."""
        piece = self.pieces.get(marker)
        if piece is None or self._types.get(marker) in (_CONTROL, _USER_DEFINED):
            return
        if self._types.get(marker) == _BYTE:
            # These bytes are in no UTF-8 text.
            if (byte := int(piece[3:5], 16)) in (0xC0, 0xC1) or byte >= 0xF5:
                return
        elif _LOOKS_SPECIAL.fullmatch(piece) and marker != self.tokenizer.unk_id:
            return
        raise UserError(f"{name}={marker} is the piece {piece!r} of {self.tokenizer.path}, which texts are made of: "
                        "give the id of a reserved piece")

    def text_encoder(self, markers: Iterable[int]) -> Tokenizer:
        """The tokenizer, but the names of markers, and of whatever looks like one, are text to it.

        SentencePiece's dummy prefix is left out: it would put a space where each text of a dialogue begins.
        """
        markers = set(markers)
        if isinstance(self.tokenizer, SentencePieceTokenizer):
            proto = self._proto()
            proto.normalizer_spec.add_dummy_prefix = False
            for index, piece in enumerate(proto.pieces):
                named = piece.type == _USER_DEFINED and _LOOKS_SPECIAL.fullmatch(piece.piece)
                if named or index in markers and piece.type in (_NORMAL, _USER_DEFINED):
                    piece.type = _CONTROL  # SentencePiece never finds a control piece in a text.
            return SentencePieceTokenizer(self.tokenizer.path, proto.SerializeToString())
        spec = json.loads(self._content)
        for token in spec.get("added_tokens", ()):
            token["special"] |= token["id"] in markers or bool(_LOOKS_SPECIAL.fullmatch(token["content"]))
        return JsonTokenizer(self.tokenizer.path, json.dumps(spec).encode())

    def _proto(self):
        from sentencepiece import sentencepiece_model_pb2

        return sentencepiece_model_pb2.ModelProto.FromString(self._content)


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

    def render(self, messages: Sequence[Message], *, loss_on: str = "answers") -> Rendered:
        """A whole dialogue. UserError where roles are unknown or stand where the template has no place for them."""
        return self.render_many([messages], loss_on=loss_on)[0]

    def render_many(self, dialogues: Sequence[Sequence[Message]], *, loss_on: str = "answers") -> list[Rendered]:
        """Each dialogue as `render` gives it; their texts are tokenized together."""
        if loss_on not in LOSS_ON:
            raise UserError(f"loss_on={loss_on!r} must be one of {', '.join(LOSS_ON)}")
        completed = [self._completed(messages) for messages in dialogues]
        parts = [self._parts(messages, prompt=False) for messages in completed]
        texts = iter(self._encode([part.text for each in parts for part in each if part.ids is None]))
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
        parts = self._parts(self._completed(messages), prompt=True)
        texts = iter(self._encode([part.text for part in parts if part.ids is None]))
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
        return [part.text if part.ids is None else part.ids for part in parts if part.text or part.ids]

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
