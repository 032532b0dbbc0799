"""The chat templates that are tables, and the choice of a template by a config. No jax here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data.chat import ROLES, ChatTemplate, Message, Part
from ctllm_jax.data.jinja_chat import JinjaTemplate
from ctllm_jax.data.tokenizer import Tokenizer
from ctllm_jax.data.vocabulary import Vocabulary

_IM_START, _IM_END = "<|im_start|>", "<|im_end|>"


class Turn(NamedTuple):
    """What stands around a role's text, each as markers (ids) and texts; an answer's `end` is learned, `after` not."""

    before: tuple[int | str, ...] = ()
    end: tuple[int | str, ...] = ()
    after: tuple[int | str, ...] = ()


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
