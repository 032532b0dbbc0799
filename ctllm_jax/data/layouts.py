"""How each field of a row is used, in every layout of dialogues and of preference pairs. No jax.

`DIALOGUES` and `PAIRS` are the tables that all readers use; docs/tuning.md explains them. A field that changes what a
row means is used, or the row is left out with the name of the field as the reason. `unread_fields` names all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ctllm_jax.data.chat import Message
from ctllm_jax.dataset.text import checked_value

DIALOGUE = "messages"  # the messages of the dialogue
QUESTION = "question"  # what is asked: a text, or messages
CONTEXT = "context"  # a text before the question, followed by an empty line
INPUT = "input"  # a text on the line after the question
HISTORY = "history"  # earlier questions and answers, in pairs
SYSTEM = "system"  # the system message; two different ones leave the row out
ANSWER = "answer"  # a text, or messages, which add what is not there yet; of an `output` of several texts the first
REJECTED = "rejected"  # the answer that was not preferred; dialogues do not read it
COMPLETIONS = "scored"  # answers with their scores
LABEL = "label"  # false leaves the row out
COPY = "copy"  # not read if the messages contain it, or it is a text of all of them; otherwise the row is left out
REFUSED = "refused"  # leaves the row out, unless it is empty

_REFUSED = ("tools", "functions", "images", "image", "videos", "video", "audios", "audio", "documents", "options",
            "choices", "chat_template_kwargs")
_EVERYWHERE = {"system": SYSTEM, "system_prompt": SYSTEM, "label": LABEL, **dict.fromkeys(_REFUSED, REFUSED)}
_COPIES = dict.fromkeys(("prompt", "question", "query", "instruction", "context", "input", "history"), COPY)
_ASKED = {"context": CONTEXT, "input": INPUT, "history": HISTORY}
_MESSAGES = {**_EVERYWHERE, **_COPIES, "messages": DIALOGUE, "conversations": DIALOGUE, "conversation": DIALOGUE,
             "prompt": QUESTION, "chosen": ANSWER, "rejected": REJECTED}
_QUESTIONS = dict.fromkeys(("prompt", "question", "query", "instruction"), QUESTION)

DIALOGUES: dict[str, dict[str, str]] = {
    "messages": _MESSAGES,
    "sharegpt": _MESSAGES,
    "alpaca": {**_EVERYWHERE, **_COPIES, **_ASKED, "instruction": QUESTION, "output": ANSWER},
    "prompt": {**_EVERYWHERE, **_ASKED, **_QUESTIONS, "completion": ANSWER, "response": ANSWER, "answer": ANSWER,
               "chosen": ANSWER, "rejected": REJECTED},
}
"""Layout -> field -> its use, when dialogues or prompts are read."""
PAIRS: dict[str, dict[str, str]] = {
    "trl": {**_EVERYWHERE, **_ASKED, **_QUESTIONS, "chosen": ANSWER, "rejected": REJECTED},
    "sharegpt": {**_EVERYWHERE, **_COPIES, "conversations": DIALOGUE, "chosen": ANSWER, "rejected": REJECTED},
    "alpaca": {**_EVERYWHERE, **_COPIES, **_ASKED, "instruction": QUESTION, "output": ANSWER},
    "ultrafeedback": {**_EVERYWHERE, **_COPIES, **_ASKED, "instruction": QUESTION, "completions": COMPLETIONS},
    "hh": {**_EVERYWHERE, **_COPIES, "chosen": ANSWER, "rejected": REJECTED},
}
"""The same for preference pairs."""

_SWITCHES = ("train", "training", "loss")  # of a message: false is a weight of 0
_REFUSED_IN_MESSAGES = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "images", "image",
                        "videos", "video", "audios", "audio", "tools", "documents", "refusal", "train_detail")
_MESSAGE_FIELDS = {"role", "content", "from", "value", "weight", *_SWITCHES, *_REFUSED_IN_MESSAGES}

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
          "bot": "assistant", "model": "assistant", "system": "system", "developer": "system"}


class Dropped(Exception):
    """A row that can be read but not used; the text is the reason."""


def messages_of(value: Any, name: str) -> list[Message]:
    """A list of messages, with fields role and content or from and value."""
    if not isinstance(value, list):
        raise ValueError(f"field {name!r} is not a list but {kind_of(value)}")
    fields = ("from", "value") if value and isinstance(value[0], dict) and "from" in value[0] else ("role", "content")
    return [_message(entry, *fields) for entry in value]


def dialogue_of(record: dict, fields: dict[str, str], *, question: str | None, answer: str | None) -> list[Message]:
    """All messages of a row: what comes before its answer, and the answer.

    An answer that repeats what is before it adds only what follows.

    Args:
      fields: the layout's part of a table.
      question: field of the question, if the row has no list of messages.
      answer: field of the answer; None: the row's messages end with it.
    """
    messages, used = _before_answer(record, fields, question)
    if answer is not None:
        of_text = question in used and not isinstance(record[question], list)
        messages = _joined(messages, answer_of(record, answer), of_text=of_text)
    messages = with_system(record, messages)
    for name, becomes in fields.items():
        asks = becomes in (DIALOGUE, QUESTION, COPY, CONTEXT, INPUT, HISTORY) and name not in used
        if asks and not is_empty(record.get(name)) and not (
                _is_part(record[name], messages) or _is_whole(record[name], messages)):
            raise Dropped(f"field {name!r}, which the messages do not contain")
    return messages


def answer_of(record: dict, name: str) -> list[Message]:
    """The messages of an answer; none if it is null."""
    value = record[name]
    if name == "output" and isinstance(value, list):
        value = value[0] if value else None
    return _as_messages(value, name, "assistant")


def with_system(record: dict, messages: list[Message]) -> list[Message]:
    """The messages, with the row's system message first."""
    given = {text.strip(): text for name in ("system", "system_prompt") if not is_empty(record.get(name))
             for text in [checked_value(record[name], name)]}
    if messages and messages[0].role == "system" and messages[0].content.strip():
        given.setdefault(messages[0].content.strip(), messages[0].content)
    if len(given) > 1:
        raise Dropped("two different system messages")
    if not given or messages and messages[0].role == "system" and messages[0].content.strip():
        return messages
    rest = messages[1:] if messages and messages[0].role == "system" else messages
    return [Message("system", *given.values()), *rest]


def check_fields(record: dict, fields: dict[str, str]) -> None:
    """Raise `Dropped` if a field has a value that changes the meaning of the row and that no reader can use."""
    for name, becomes in fields.items():
        if becomes == REFUSED and not is_empty(record.get(name)):
            raise Dropped(f"field {name!r}")
    if record.get("label") is False and fields.get("label") == LABEL:
        raise Dropped("label is false")


def unread_fields(record: dict, fields: dict[str, str]) -> Iterator[str]:
    """The names of fields of a row, and of its messages, that are in no table."""
    for name, value in record.items():
        if name not in fields:
            if value not in (None, "", [], {}):
                yield str(name)
        elif isinstance(value, list) and fields[name] not in (HISTORY, COMPLETIONS):
            yield from {f"{name}[].{key}" for entry in value if isinstance(entry, dict)
                        for key in entry if key not in _MESSAGE_FIELDS and entry[key] not in (None, "", [], {})}


def is_empty(value: Any, *, depth: int = 3) -> bool:
    """Whether a value is empty: null, false, an empty text, or a list or an object of such values."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, (dict, list, tuple)):
        each = value.values() if isinstance(value, dict) else value
        return not value or depth > 0 and all(is_empty(one, depth=depth - 1) for one in each)
    return value is None or value is False


def kind_of(value: Any) -> str:
    """The kind of a value in words."""
    if isinstance(value, list) and value:
        inner = f"{{{', '.join(map(str, value[0]))}}}" if isinstance(value[0], dict) else type(value[0]).__name__
        return f"list of {inner}"
    return {"str": "text", "NoneType": "null"}.get(type(value).__name__, type(value).__name__)


def _message(entry: Any, role_field: str, text_field: str) -> Message:
    if not isinstance(entry, dict) or role_field not in entry or text_field not in entry:
        seen = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"a message needs {role_field} and {text_field}; it has {seen or 'nothing'}")
    role = _ROLES.get(entry[role_field].lower()) if isinstance(entry[role_field], str) else None
    if role is None:
        raise Dropped(f"role {entry[role_field]!r}")
    for name in _REFUSED_IN_MESSAGES:
        if not is_empty(entry.get(name)):
            raise Dropped(f"field {name!r} of a message")
    content = entry[text_field]
    if content is None:
        raise Dropped("a message without text")
    if isinstance(content, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise Dropped("content that is not text")
        content = "".join(checked_value(part.get("text"), "text") for part in content)
    return Message(role, checked_value(content, text_field), _weight(entry))


def _weight(entry: dict) -> float:
    weight = 1.0 if entry.get("weight") is None else entry["weight"]
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise ValueError(f"weight={weight!r} must be a number of at least 0")
    for name in _SWITCHES:
        switch = entry.get(name)
        if not isinstance(switch, bool | None):
            raise ValueError(f"{name}={switch!r} must be true or false")
        weight = 0 if switch is False else weight
    return float(weight)


def _as_messages(value: Any, name: str, role: str) -> list[Message]:
    if value is None:
        return []
    if isinstance(value, dict):
        value = [value]
    return messages_of(value, name) if isinstance(value, list) else [Message(role, checked_value(value, name))]


def _before_answer(record: dict, fields: dict[str, str], question: str | None) -> tuple[list[Message], tuple[str, ...]]:
    """The messages before the answer, and the fields that they come from."""
    dialogue = next((name for name, becomes in fields.items()
                     if becomes == DIALOGUE and not is_empty(record.get(name))), None)
    if dialogue is not None:
        return messages_of(record[dialogue], dialogue), (dialogue,)
    if question is None:
        return [], ()
    if question not in record:
        raise ValueError(f"no field {question!r}")
    if isinstance(record.get(question), (list, dict)):
        return _as_messages(record[question], question, "user"), (question,)
    messages: list[Message] = []
    history = record.get("history") or []
    pairs = (list, tuple)
    if not isinstance(history, pairs) or any(not isinstance(turn, pairs) or len(turn) != 2 for turn in history):
        raise ValueError("history must be a list of pairs of question and answer")
    for turn in history:
        messages += [Message(role, checked_value(said, "history"))
                     for role, said in zip(("user", "assistant"), turn, strict=True)]
    context, said, given = (_text(record, name) for name in ("context", question, "input"))
    asked = "\n".join(filter(None, [said, given if question != "input" else ""]))
    messages.append(Message("user", "\n\n".join(filter(None, [context, asked]))))
    return messages, (question, *_ASKED)


def _text(record: dict, name: str) -> str:
    """A text that may be absent. Raises `Dropped` if a context is not text."""
    value = record.get(name)
    if name == "context" and not isinstance(value, str | None):
        raise Dropped("a context that is not text")
    return "" if value is None else checked_value(value, name)


def _joined(before: Sequence[Message], answer: Sequence[Message], *, of_text: bool) -> list[Message]:
    """Append an answer to the messages; the answer may repeat some or all of them at its beginning."""
    old, new = ([(message.role, message.content.strip()) for message in side] for side in (before, answer))
    for again in range(min(len(old), len(new)), 0, -1):
        if old[-again:] == new[:again]:
            return [*before, *answer[again:]]
    if old and any(new[start:start + len(old)] == old for start in range(len(new))):
        return list(answer)
    if of_text and new and new[0][0] != "assistant":
        raise Dropped("the question is not among the messages of its answer")
    return [*before, *answer]


def _is_part(value: Any, messages: Sequence[Message], *, depth: int = 3) -> bool:
    """Whether each text in a value is also in one of the messages."""
    if isinstance(value, str):
        return any(value.strip() in message.content for message in messages)
    if isinstance(value, dict):
        value = [value[name] for name in ("content", "value") if name in value]
    return (isinstance(value, (list, tuple)) and depth > 0
            and all(_is_part(each, messages, depth=depth - 1) for each in value))


def _is_whole(value: Any, messages: Sequence[Message]) -> bool:
    """Whether a value is a text that contains all messages, of which the last is an answer and ends the text."""
    return (isinstance(value, str) and bool(messages) and messages[-1].role == "assistant"
            and value.rstrip().endswith(messages[-1].content.strip())
            and all(message.content.strip() in value for message in messages))
