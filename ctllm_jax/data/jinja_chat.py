"""Chat templates of imported tokenizers, in Hugging Face's Jinja format. No jax.

The template is rendered with a placeholder for the text of each message; the output between the placeholders consists
of the markers. For every dialogue we check that rendering with the real texts gives the same. So markers typed in a
message stay text, and a template that rewrites messages is refused.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data.chat import ChatTemplate, Message, Part
from ctllm_jax.data.jinja_render import RenderError, is_available, render
from ctllm_jax.data.vocabulary import Vocabulary, looks_special

# Characters of Unicode's private use area; a template that contains one is refused.
_OPEN, _CLOSE, _BEGIN_ANSWER, _END_ANSWER = "\ue000\ue001\ue002\ue003"
_PLACEHOLDER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_MOST_KEPT, _LONGEST_KEPT = 256, 64
TEMPLATE = "chat_template.jinja"
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
"""Settings that name a special token."""
logger = logging.getLogger(__name__)


class _Literal(NamedTuple):
    """A part between messages: ids of a special token, or a text; `message` is the index of the message before it."""

    text: str
    special: int | None
    message: int
    is_answer: bool


class _Slot(NamedTuple):
    """The place of a message's text."""

    message: int
    is_answer: bool


class JinjaTemplate(ChatTemplate):
    """A Hugging Face template. Answers are inside {% generation %}, or found by rendering growing prefixes of the
    dialogue."""

    def __init__(self, config: TemplateConfig, vocabulary: Vocabulary):
        self.path = Path(config.path)
        self._source, settings = _read(self.path)
        if re.search(f"[{_OPEN}-{_END_ANSWER}]", self._source):
            raise UserError(f"{self.path} holds a private-use character between U+E000 and U+E003")
        added = added_tokens(settings)
        for name, index in added.items():
            if vocabulary.ids.get(name, index) != index:
                raise UserError(f"{self.path} gives {name!r} the id {index}, and {vocabulary.tokenizer.path} gives it"
                                f" {vocabulary.ids[name]}: they belong to different models")
            if vocabulary.pieces.get(index, name) != name:
                vocabulary.check_marker(index, f"{self.path}: {name}")
        self._special = vocabulary.special_tokens() | {
            name: index for name, index in added.items() if _is_special(settings, index) or looks_special(name)}
        self._settings = settings
        self._names = {name: token_text(settings.get(name)) for name in NAMES
                       if settings.get(name) is not None}
        super().__init__(vocabulary, self._special.values())
        self.kind = "jinja"
        self.system = config.system
        self._has_markers = re.search(r"{%-?\+?\s*generation\b", self._source) is not None
        self._compile()
        # The role sequences of short dialogues recur; those of long ones rarely do, and are large.
        self._kept = lru_cache(maxsize=_MOST_KEPT)(self._dissect)
        ends = [item.special for item in self._skeleton(("user", "assistant"), prompt=False)
                if isinstance(item, _Literal) and item.is_answer and item.special is not None]
        trained = "".join(item.text for item in self._skeleton(("user", "assistant"), prompt=False)
                          if isinstance(item, _Literal))
        asked = "".join(item.text for item in self._skeleton(("user",), prompt=True) if isinstance(item, _Literal))
        if not trained.startswith(asked):
            logger.warning("%s: the generation prompt differs from what precedes an answer in training: a chat will "
                           "differ from the training", self.path)
        eos = vocabulary.tokenizer.eos_id
        self.stop_ids = tuple(dict.fromkeys(ends + ([] if eos is None else [eos])))

    def to_jinja(self) -> str:
        """The template's source."""
        return self._source

    def write(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """The dialogue, or the prompt for its next answer, as the one text that Hugging Face tokenizes."""
        return self._run([{"role": message.role, "content": message.content} for message in self._completed(messages)],
                         prompt=prompt)

    def _spoken(self) -> dict[int, str]:
        skeleton = [item.special for item in self._skeleton(("user", "assistant"), prompt=False)
                    if isinstance(item, _Literal) and item.special is not None]
        structural = {index for index in skeleton
                      if self._vocabulary.is_special(index) or _is_special(self._settings, index)}
        structural |= {*self.stop_ids, *(self._special[name] for name in self._names.values() if name in self._special)}
        added = {index: name for name, index in self._special.items() if index not in self._vocabulary.pieces}
        return self._vocabulary.spoken_tokens(structural) | {
            index: name for index, name in added.items() if index not in structural}

    def _identity(self) -> Any:
        return {"kind": self.kind, "source": self._source, "system": self.system, "special": self._special,
                "names": self._names}

    def _parts(self, messages: Sequence[Message], *, prompt: bool) -> list[Part]:
        skeleton = self._skeleton(tuple(message.role for message in messages), prompt=prompt)
        written = self._run([{"role": message.role, "content": message.content} for message in messages], prompt=prompt)
        for texts in ([message.content for message in messages], [message.content.strip() for message in messages]):
            if written == "".join(texts[item.message] if isinstance(item, _Slot) else item.text for item in skeleton):
                break
        else:
            raise UserError(f"{self.path} rewrites the text of a message, so its answer tokens are not "
                            f"known; the dialogue begins {messages[0].content[:60]!r}")
        parts = []
        for item in skeleton:
            if isinstance(item, _Slot):
                parts.append(Part(None, texts[item.message], item.message, item.is_answer))
            elif item.special is not None:
                parts.append(Part((item.special,), "", item.message, item.is_answer))
            else:
                parts.append(Part(None, item.text, item.message, item.is_answer))
        return parts

    def _skeleton(self, roles: tuple[str, ...], *, prompt: bool) -> list[_Literal | _Slot]:
        """The parts of a dialogue with these roles, for any texts."""
        return (self._kept if len(roles) <= _LONGEST_KEPT else self._dissect)(roles, prompt)

    def _dissect(self, roles: tuple[str, ...], prompt: bool) -> list[_Literal | _Slot]:
        messages = [{"role": role, "content": f"{_OPEN}{index}{_CLOSE}"} for index, role in enumerate(roles)]
        written = self._run(messages, prompt=prompt, mark=self._has_markers)
        if [int(index) for index in _PLACEHOLDER.findall(written)] != list(range(len(roles))):
            raise UserError(f"{self.path} does not write every message once and in order, for the roles "
                            f"{', '.join(roles)}")
        found: list[_Literal | _Slot] = []
        message, inside = -1, False
        special = "|".join(map(re.escape, sorted(self._special, key=len, reverse=True)))
        pieces = re.split(f"({_OPEN}\\d+{_CLOSE}|[{_BEGIN_ANSWER}{_END_ANSWER}]" + (f"|{special})" if special else ")"),
                          written)
        for piece in filter(None, pieces):
            if piece in (_BEGIN_ANSWER, _END_ANSWER):
                inside = piece == _BEGIN_ANSWER
            elif match := _PLACEHOLDER.fullmatch(piece):
                message = int(match[1])
                if not self._has_markers and not prompt and roles[message] == "assistant":
                    self._check_generation_prompt(messages, message, written[:written.index(piece)])
                    inside = True
                found.append(_Slot(message, inside))
            else:
                found.append(_Literal(piece, self._special.get(piece), message, inside))
                if inside and not self._has_markers and piece in self._special:
                    inside = False
        if not prompt:
            self._check_answers(found, roles)
        return found

    def _check_generation_prompt(self, messages: list[dict], answer: int, before: str) -> None:
        """Raise UserError unless the prompt for this answer equals what precedes it in the whole dialogue."""
        if self._run(messages[:answer], prompt=True) != before:
            raise UserError(f"{self.path} has no {{% generation %}} markers, and its generation prompt is not what it "
                            "writes before an answer, so which tokens are the answer's is not known: put "
                            "{% generation %} and {% endgeneration %} around what the model is to write")

    def _check_answers(self, found: list[_Literal | _Slot], roles: tuple[str, ...]) -> None:
        """Raise UserError unless exactly the answers are trained on, each with a special token at its end."""
        wrong = [item.message for item in found
                 if isinstance(item, _Slot) and item.is_answer != (roles[item.message] == "assistant")]
        if wrong:
            raise UserError(f"{self.path}: {{% generation %}} is not around the answers: message {wrong[0]} is of the "
                            f"role {roles[wrong[0]]}")
        ended = {item.message for item in found if isinstance(item, _Literal) and item.is_answer
                 and item.special is not None}
        for message, role in enumerate(roles):
            if role == "assistant" and message not in ended:
                raise UserError(f"{self.path}: no special token ends an answer, so a model would not learn to stop; "
                                f"special tokens: {', '.join(list(self._special)[:8]) or 'none'}")

    def _run(self, messages: list[dict], *, prompt: bool, mark: bool = False) -> str:
        try:
            return render(self._source, {"messages": messages, "add_generation_prompt": prompt, **self._names},
                          marks=(_BEGIN_ANSWER, _END_ANSWER) if mark else ("", ""))
        except RenderError as error:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages)) or "none"
            raise UserError(f"{self.path} cannot write a dialogue of the roles {roles}: {error}") from None

    def _compile(self) -> None:
        if not is_available():
            raise UserError(f"{self.path} needs the package jinja2: pip install 'ctllm-jax[hf]'")
        try:
            render(self._source, None)
        except RenderError as error:
            place = f"line {error.line} of the chat template" if error.line else "the chat template"
            raise UserError(f"{self.path}: {place}: {error}") from None


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a tokenizer: tokenizer_config.json, and the separate files of older layouts."""
    settings = _read_json(folder / "tokenizer_config.json")
    named = _read_json(folder / "special_tokens_map.json")
    settings = {name: named[name] for name in NAMES if name in named} | {
        name: value for name, value in settings.items() if value is not None or name not in named}
    known = settings.get("added_tokens_decoder") or {}
    special = [*(settings.get(name) for name in NAMES), *(named | settings).get("additional_special_tokens", ())]
    special = [token_text(token) for token in special if token]
    added = {str(index): {"content": name, "special": name in special}
             for name, index in _read_json(folder / "added_tokens.json").items()}
    return settings | {"added_tokens_decoder": added | known} if added or known else settings


def read_template(path: Path) -> tuple[str | None, dict[str, Any]]:
    """Return the source of a template, None if a folder has none, and the settings of the tokenizer next to it.

    Raises:
      UserError: the file does not exist, or is malformed.
    """
    settings = read_settings(path if path.is_dir() else path.parent)
    file = path / TEMPLATE if path.is_dir() else path
    if file.is_file():
        return file.read_text(encoding="utf-8"), settings
    if not path.is_dir():
        raise UserError(f"template.path={path} does not exist")
    given = settings.get("chat_template")
    if isinstance(given, list):
        given = next((each["template"] for each in given if each["name"] == "default"), None)
    return given or None, settings


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    source, settings = read_template(path)
    if source is None:
        raise UserError(f"template.path={path} has no chat template: neither {TEMPLATE} nor chat_template in "
                        "tokenizer_config.json")
    return source, settings


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is malformed: {error}") from None


def token_text(given: str | dict) -> str:
    """The text of a token, which settings give as a string or with its properties."""
    return given["content"] if isinstance(given, dict) else given


def added_tokens(settings: dict) -> dict[str, int]:
    """Name -> id of the tokens that settings add to a tokenizer, of either kind."""
    return {token["content"]: int(index) for index, token in (settings.get("added_tokens_decoder") or {}).items()}


def _is_special(settings: dict, index: int) -> bool:
    return bool((settings.get("added_tokens_decoder") or {}).get(str(index), {}).get("special"))
