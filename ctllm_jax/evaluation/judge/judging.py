"""Ask a judge for ratings of answers, and for choices between two. No jax.

The key of a request is a hash of the judge, its settings and every message, so that no request is repeated, even if two
models gave the same answer. A reply without a result is followed up once, with a request for only the result.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.judge import GraderConfig
from ctllm_jax.data.chat import Message
from ctllm_jax.data.questions import Question
from ctllm_jax.evaluation.judge.answers import Given
from ctllm_jax.evaluation.judge.prompts import Prompt, Prompts, pair, single
from ctllm_jax.evaluation.judge.replies import LOWEST, read_rating, read_verdict
from ctllm_jax.inference.endpoint import Endpoint, EndpointError, Request
from ctllm_jax.inference.keyed_file import KeyedFile

_SENT = ("model", "max_tokens", "temperature", "top_p", "body", "send_seed")
_SHOWN = 3  # number of failures that are logged in full
_GREETING = "这是一次连接测试，请只回复：好"
logger = logging.getLogger(__name__)


class Item(NamedTuple):
    """A requested reply: a rating (`read_rating`) or a verdict (`read_verdict`)."""

    key: str
    prompt: Prompt
    messages: tuple[Message, ...]
    question: Question
    turn: int
    read: Callable[[str], float | str | None]


class Judgment(NamedTuple):
    """The judge's reply to one item.

    Attributes:
      result: a rating from 1 to 10, or A, B or C; None if none could be parsed, or none arrived.
      text: its text; empty if nothing was requested.
      again: its reply to the follow-up; None if there was none.
      prompt: name of the prompt; None if nothing was requested.
      missing: no reply has arrived; the next call retries.
    """

    result: float | str | None
    text: str = ""
    again: str | None = None
    prompt: str | None = None
    missing: bool = False


class Judge:
    """The judge model; `backoff` as for `Endpoint`.

    Raises:
      UserError: the variable that the config names holds no key.
    """

    def __init__(self, config: GraderConfig, prompts: Prompts, *, backoff: float = 1.0):
        self.config, self.prompts = config, prompts
        self.endpoint = Endpoint(config, backoff=backoff)
        self.identity = {name: config.model_dump(mode="json")[name] for name in _SENT}

    def check(self) -> None:
        """Send one small request, with one retry. Raises UserError if the judge cannot be reached."""
        config = self.config.model_copy(update={"retries": min(self.config.retries, 1)})
        try:
            Endpoint(config).ask(Request((Message("user", _GREETING),)))
        except EndpointError as error:
            raise UserError(f"the judge cannot be asked, and nothing was begun: {error}") from None

    def rating(self, question: Question, answers: Sequence[str]) -> Item:
        """The request for a rating of the last of one or two answers."""
        return self._item(question, len(answers), read_rating, *single(self.prompts, question, answers))

    def verdict(self, question: Question, first: Sequence[str], second: Sequence[str]) -> Item:
        """The request for a choice between the last answers of two."""
        return self._item(question, len(first), read_verdict, *pair(self.prompts, question, first, second))

    def _item(self, question: Question, turn: int, read, prompt: Prompt, messages: tuple[Message, ...]) -> Item:
        content = json.dumps([self.identity, prompt.again, [message[:2] for message in messages]], sort_keys=True)
        return Item(hashlib.sha256(content.encode()).hexdigest()[:32], prompt, messages, question, turn, read)

    def ask(self, items: Iterable[Item], *, file: KeyedFile, advance: Callable[[], None] = lambda: None,
            before: Callable[[], None] = lambda: None) -> None:
        """Fill `file` with the judge's reply to each item, and to the follow-up if needed.

        Args:
          advance: called for each item, including duplicates, that has its reply or failed.
          before: called once before the first is asked for.

        Raises:
          EndpointError: the endpoint gives no reply.
        """
        items = list(items)
        unique = {item.key: item for item in items}
        wanted = [item for key, item in unique.items() if key not in file]
        again = [item for key, item in unique.items() if key in file and _is_open(file.rows[key])]
        if wanted or again:
            before()
        for _ in range(len(items) - len(wanted)):
            advance()
        for item, row in self._replies(wanted, [item.messages for item in wanted]):
            if row is not None:
                file.add(item.key, {"question_id": item.question.id, "turn": item.turn, "prompt": item.prompt.name,
                                    "result": _result(item, row), **row, "again": None})
                if _is_open(file.rows[item.key]):
                    again.append(item)
            advance()
        for item, row in self._replies(again, [_follow_up(item, file.rows[item.key]["text"]) for item in again]):
            if row is not None:
                kept = {name: value for name, value in file.rows[item.key].items() if name != "key"}
                file.add(item.key, {**kept, "result": _result(item, row), "again": row["text"],
                                    "again_is_cut": row["is_cut"]})

    def _replies(self, items: Sequence[Item], messages: Sequence[Sequence[Message]]):
        """Yield each item with its reply as a row, or with None if there is none."""
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        requests = [Request(each, int(item.key[:8], 16) & 0x7FFFFFFF)
                    for item, each in zip(items, messages, strict=True)]
        failed = 0
        for item, reply in zip(items, self.endpoint.ask_many(requests), strict=True):
            if isinstance(reply, EndpointError):
                failed += 1
                logger.log(logging.WARNING if failed <= _SHOWN else logging.INFO, "%s, turn %d, was not judged: %s",
                           item.question.source, item.turn, reply)
                yield item, None
            else:
                yield item, {"text": reply.text, "is_cut": reply.is_cut, "model": reply.model,
                             "base_url": self.config.base_url, "date": today}


def ratings(judge: Judge, questions: Sequence[Question], given: Given) -> tuple[list[Item], Callable]:
    """The requests for ratings of all answers, and `(file) -> judgments by question and turn`, to be called after them.

    An empty answer is rated 1 without a request; an absent answer has no judgment.
    """
    known: dict[tuple[str, int], Judgment] = {}
    items: dict[tuple[str, int], Item] = {}
    for question, turn in turns_of(questions):
        answers = _up_to(given, question, turn)
        if answers is None:
            known[question.id, turn] = Judgment(None, missing=True)
        elif not answers[-1].strip():
            known[question.id, turn] = Judgment(LOWEST)
        else:
            items[question.id, turn] = judge.rating(question, answers)
    return list(items.values()), lambda file: known | {place: _judgment(item, file) for place, item in items.items()}


def choices(judge: Judge, questions: Sequence[Question], first: Given, second: Given) -> tuple[list[Item], Callable]:
    """The requests for choices between all answers of two, in both orders, and `(file) -> two judgments by question and
    turn`, the second with the answers swapped, to be called after them.

    Equal answers are a tie, and an empty answer loses, without a request.
    """
    known: dict[tuple[str, int], tuple[Judgment, Judgment]] = {}
    items: dict[tuple[str, int], tuple[Item, Item]] = {}
    for question, turn in turns_of(questions):
        one, other = _up_to(first, question, turn), _up_to(second, question, turn)
        if one is None or other is None:
            known[question.id, turn] = (Judgment(None, missing=True),) * 2
        elif one[-1].split() == other[-1].split():
            known[question.id, turn] = (Judgment("C"),) * 2
        elif not one[-1].strip():
            known[question.id, turn] = (Judgment("B"), Judgment("A"))
        elif not other[-1].strip():
            known[question.id, turn] = (Judgment("A"), Judgment("B"))
        else:
            items[question.id, turn] = (judge.verdict(question, one, other), judge.verdict(question, other, one))
    return [item for both in items.values() for item in both], lambda file: known | {
        place: tuple(_judgment(item, file) for item in both) for place, both in items.items()}


def turns_of(questions: Iterable[Question]) -> list[tuple[Question, int]]:
    """Every turn of every question, from 0."""
    return [(question, turn) for question in questions for turn in range(len(question.turns))]


def _up_to(given: Given, question: Question, turn: int) -> list[str] | None:
    """The answers up to a turn; None if one is absent."""
    found = [given.get((question.id, each)) for each in range(turn + 1)]
    return None if None in found else [each.text for each in found]


def _judgment(item: Item, file: KeyedFile) -> Judgment:
    row = file.rows.get(item.key)
    if row is None:
        return Judgment(None, prompt=item.prompt.name, missing=True)
    return Judgment(row["result"], row["text"], row["again"], row["prompt"], missing=_is_open(row))


def _result(item: Item, row: dict[str, Any]) -> float | str | None:
    """Parse the result of a reply. A reply that the token limit ended has no result, because its rest is unknown."""
    return None if row["is_cut"] else item.read(row["text"])


def _is_open(row: dict[str, Any]) -> bool:
    """Whether a reply without a result was not followed up yet."""
    return row["result"] is None and row["again"] is None


def _follow_up(item: Item, said: str) -> tuple[Message, ...]:
    """The dialogue that requests only the result. An empty reply is left out, and the two requests are merged."""
    if said.strip():
        return (*item.messages, Message("assistant", said), Message("user", item.prompt.again))
    *before, asked = item.messages
    return (*before, Message("user", f"{asked.content}\n\n{item.prompt.again}"))
