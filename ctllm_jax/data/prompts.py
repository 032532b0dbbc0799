"""Read files of dialogues or of questions as prompts for answers. No jax.

The layouts are those of `conversations`, with their answers or without: `prompt`, `question`, `query` or `instruction`
may be the only field, and messages may end with a question. Rows of preference pairs are read too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ctllm_jax.config.errors import UserError
from ctllm_jax.data.chat import Message
from ctllm_jax.data.conversations import message_parser, read_rows, up_to_last_answer
from ctllm_jax.data.layouts import Dropped

_ANSWER_OF = {"instruction": "output", "prompt": "completion", "question": "answer", "query": "response"}


class Prompt(NamedTuple):
    """The messages to answer, the file's answer to them (None: not read), and their place, from 1."""

    messages: tuple[Message, ...]
    answer: str | None
    file: Path
    row: int


class Prompts(NamedTuple):
    """The prompts, the layout of each file in words, rows read, rows left out by reason."""

    prompts: list[Prompt]
    layouts: dict[str, str]
    rows: int
    dropped: dict[str, int]


def read_prompts(path: Path | str, *, with_answers: bool, layout: str | None = None, max_bad: int = 0) -> Prompts:
    """Read all prompts of a file, or of the files below a folder in order of their paths.

    With answers, the last answer of a dialogue is used, the messages before it are the prompt, and messages after it
    are removed. Without, an answer at the end of a dialogue is removed. A row without a question at the end is dropped
    and counted. A row that cannot be read counts against `max_bad`. Raises UserError if there are more, if no layout is
    recognized, or if nothing is left.
    """
    layouts: dict[str, str] = {}
    tables: dict[Path, dict[str, str]] = {}
    parse_messages = message_parser(layout, layouts, tables)

    def parse(record: dict, file: Path, row: int) -> Prompt:
        if with_answers:
            *messages, answer = up_to_last_answer(parse_messages(record, file, row))
            if not answer.weight:
                raise Dropped("a last answer of weight 0, which is not to be learned")
            return Prompt(_checked(messages), answer.content, file, row)
        name = next((name for name in _ANSWER_OF if name in record), None)
        messages = parse_messages({_ANSWER_OF[name]: None, **record} if name else record, file, row)
        return Prompt(_checked(messages[:-1] if messages and messages[-1].role == "assistant" else messages), None,
                      file, row)

    read = read_rows(path, parse, max_bad=max_bad, tables=tables)
    if not read.parsed:
        needed = "dialogue with an answer" if with_answers else "question"
        raise UserError(f"{path} holds no {needed} ({read.rows} rows, {read.dropped or 'all empty'})")
    return Prompts(read.parsed, layouts, read.rows, read.dropped)


def _checked(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages without weights, if they can be answered. An empty system prompt counts as none."""
    if messages and messages[0].role == "system" and not messages[0].content.strip():
        messages = messages[1:]
    if not messages or messages[-1].role != "user":
        raise Dropped("no question at the end")
    if any(message.role == "system" for message in messages[1:]):
        raise Dropped("system prompt after the first message")
    if not all(message.content.strip() for message in messages):
        raise Dropped("an empty message")
    return tuple(Message(message.role, message.content) for message in messages)
