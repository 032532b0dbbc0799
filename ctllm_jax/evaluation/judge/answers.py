"""Sources of answers to judged questions: a local MODEL, an endpoint, or a file. Only the first imports jax.

A question of two turns is asked in turn, the second with the first answer before it. Each answer is a separate row,
whose key is a hash of everything that determines it: the model, the settings, and every message before it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.judge import AnswersConfig
from ctllm_jax.data.chat import Message
from ctllm_jax.data.questions import Question, canonical
from ctllm_jax.dataset.text import json_lines
from ctllm_jax.inference.endpoint import Endpoint, EndpointError, Request
from ctllm_jax.inference.keyed_file import KeyedFile

if TYPE_CHECKING:
    from ctllm_jax.inference.engine import Engine

_MOST_SLOTS = 256
_MARKERS = 16  # estimated template tokens around a turn; more of them only need a second engine
_SHOWN = 3  # number of failures that are logged in full
_SENT = ("max_tokens", "top_p", "body", "send_seed")
NO_ROOM = "the question leaves no room in the model's context"
NO_FIRST = "the first turn has no answer"
logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """The answer to one turn.

    Attributes:
      is_cut: a limit on tokens ended it.
      note: the reason if it is empty, if known.
    """

    text: str
    is_cut: bool = False
    note: str | None = None


Given = dict[tuple[str, int], Answer]
"""Answers by the question's id and the turn, from 0."""


class Ask(NamedTuple):
    """A turn to answer."""

    messages: tuple[Message, ...]
    temperature: float | None
    key: str

    @property
    def row_id(self) -> int:
        """32 bits of the key, which seed the random draws for this answer."""
        return int(self.key[:8], 16)


class Answerer(ABC):
    """A source of answers.

    Attributes:
      name: its name in tables.
      identity: everything that determines the answers except the questions and their temperatures, as JSON.
    """

    name: str
    identity: dict[str, Any]

    @abstractmethod
    def write(self, asks: Sequence[Ask]) -> Iterator[Answer | EndpointError]:
        """Yield the answer to each turn, or the reason why there is none."""


class EndpointAnswerer(Answerer):
    """An endpoint. Its address, timeouts and retries may change.

    Raises:
      UserError: the variable that the config names holds no key.
    """

    def __init__(self, config: AnswersConfig):
        self._endpoint = Endpoint(config)
        self._seed = config.seed
        self.name = config.name or config.model
        options = config.model_dump(mode="json", include=set(_SENT))
        self.identity = {"kind": "endpoint", "model": config.model, "system": config.system,
                         "seed": config.seed if config.send_seed else None, **{name: options[name] for name in _SENT}}

    def write(self, asks: Sequence[Ask]) -> Iterator[Answer | EndpointError]:
        """See `Answerer`."""
        requests = [Request(ask.messages, (ask.row_id ^ self._seed) & 0x7FFFFFFF, ask.temperature) for ask in asks]
        for reply in self._endpoint.ask_many(requests):
            yield reply if isinstance(reply, EndpointError) else Answer(reply.text, reply.is_cut)


class ModelAnswerer(Answerer):
    """A local MODEL with its chat template; many answers at once.

    Args:
      model: a run directory, RUN@STEP, or a Hugging Face folder.
      questions: all its questions; the longest determines how many are processed at once.

    Raises:
      UserError: there is no such model, or it was not trained on dialogues.
    """

    def __init__(self, model: str, config: AnswersConfig, *, name: str, questions: Sequence[Question]):
        from ctllm_jax.inference.model import fingerprint, load_model

        self._config, self.name = config, name
        self._model = loaded = load_model(model, dtype=config.dtype)
        if loaded.template is None:
            raise UserError(f"{model} was not taught to answer: it has no chat template. `sft` teaches it")
        self._engine: Engine | None = None
        self._count = len(questions)
        self._context = loaded.decoder.config.context_length
        self._longest = max(len(loaded.tokenizer.encode("".join(question.turns)))
                            + len(question.turns) * (config.max_tokens + _MARKERS) for question in questions)
        options = config.model_dump(mode="json", include={"system", "max_tokens", "top_k", "top_p", "seed", "dtype"})
        self.identity = {"kind": "model", "step": loaded.step, "fingerprint": fingerprint(loaded), **options}

    def write(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        """See `Answerer`."""
        from ctllm_jax.inference.request import Request as Drawn

        config, model = self._config, self._model
        prompts = [self._prompt(ask) for ask in asks]
        requests = (Drawn(prompt=tuple(ids), max_tokens=min(config.max_tokens, self._context - len(ids)),
                          temperature=ask.temperature, top_k=config.top_k,
                          top_p=1.0 if config.top_p is None else config.top_p,
                          stop_ids=model.stop_ids, seed=config.seed, row=ask.row_id)
                    for ask, ids in zip(asks, prompts, strict=True) if not isinstance(ids, Answer))
        fits = [ids for ids in prompts if not isinstance(ids, Answer)]
        written = self._open_engine(max(map(len, fits))).run(requests) if fits else iter(())
        for ids in prompts:
            if isinstance(ids, Answer):
                yield ids
                continue
            _, text, finish = next(written)
            is_cut = finish == "length"
            # A character that is cut after its first bytes.
            yield Answer(text.rstrip("\ufffd") if is_cut else text, is_cut)

    def _prompt(self, ask: Ask) -> list[int] | Answer:
        """The ids of the prompt, or the empty answer of a question that cannot be asked."""
        try:
            ids = self._model.template.prompt_ids(ask.messages)
        except UserError as error:
            return Answer("", note=f"refused by the chat template: {error}")
        return ids if len(ids) + self._config.min_room <= self._context else Answer("", note=NO_ROOM)

    def _open_engine(self, longest_prompt: int) -> Engine:
        """One engine for both turns, so that programs are compiled once."""
        needed = min(longest_prompt + self._config.max_tokens, self._context)
        if self._engine is None or self._engine.max_length < needed:
            longest = min(max(self._longest, needed), self._context)
            slots = min(max(1, self._config.batch_tokens // longest), _MOST_SLOTS, self._count)
            self._engine = self._model.engine(slots=slots, max_length=longest)
        return self._engine


def temperature_of(question: Question, config: AnswersConfig) -> float | None:
    """The temperature at which a question is answered; None: a server's own."""
    named = {canonical(name): value for name, value in config.temperatures.items()}
    return named.get(question.category, config.temperature)


def answer(answerer: Answerer, questions: Sequence[Question], config: AnswersConfig, *, file: KeyedFile,
           advance: Callable[[], None] = lambda: None, before: Callable[[], None] = lambda: None) -> Given:
    """All answers of one source: existing ones from `file`, and new ones, which are appended to it.

    Args:
      advance: called for each turn that has its answer, or failed.
      before: called once before the first request.

    Returns:
      The answers. One whose request failed is absent, and so is the following turn; the next call retries.

    Raises:
      EndpointError: an endpoint that gives none.
    """
    given: Given = {}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    failed = 0
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [question for question in questions if len(question.turns) > turn]
        asks: dict[str, tuple[Ask, Question]] = {}
        keys: dict[str, str] = {}
        for question in asked:
            earlier = [given.get((question.id, each)) for each in range(turn)]
            if None in earlier:
                advance()
            elif any(not each.text.strip() for each in earlier):
                given[question.id, turn] = Answer("", note=NO_FIRST)
                advance()
            else:
                ask = _ask(answerer, question, [each.text for each in earlier], config)
                keys[question.id] = ask.key
                asks[ask.key] = (ask, question)
        wanted = [(ask, question) for ask, question in asks.values() if ask.key not in file]
        if wanted:
            before()
        for _ in range(len(keys) - len(wanted)):
            advance()
        for (ask, question), found in zip(wanted, answerer.write([ask for ask, _ in wanted]) if wanted else (),
                                          strict=True):
            if isinstance(found, EndpointError):
                failed += 1
                logger.log(logging.WARNING if failed <= _SHOWN else logging.INFO, "%s has no answer: %s",
                           question.source, found)
            else:
                file.add(ask.key, {"question_id": question.id, "category": question.category, "turn": turn + 1,
                                   "answerer": answerer.name, "answer": found.text, "is_cut": found.is_cut,
                                   "note": found.note, "temperature": ask.temperature, "by": answerer.identity,
                                   "date": today})
            advance()
        for name, key in keys.items():
            if key in file:
                row = file.rows[key]
                given[name, turn] = Answer(row["answer"], row["is_cut"], row["note"])
    return given


def _ask(answerer: Answerer, question: Question, earlier: Sequence[str], config: AnswersConfig) -> Ask:
    messages = [Message("system", config.system)] if config.system else []
    for text, reply in zip(question.turns, earlier, strict=False):
        messages += [Message("user", text), Message("assistant", reply)]
    messages.append(Message("user", question.turns[len(earlier)]))
    temperature = temperature_of(question, config)
    content = json.dumps([answerer.identity, temperature, [message[:2] for message in messages]], sort_keys=True)
    return Ask(tuple(messages), temperature, hashlib.sha256(content.encode()).hexdigest()[:32])


def read_answers(path: Path | str, questions: Sequence[Question]) -> tuple[str | None, Given]:
    """Read (the name of the model, if the file has it; the answers) from JSON lines by `question_id`.

    A row holds `answers` (or `turns`, or MT-Bench's `choices[0].turns`): a text for each turn; or `answer`, one text.

    Raises:
      UserError: a row cannot be read (with its line), a question has no answer, or several models answered.
    """
    found: dict[str, list[str]] = {}
    names: set[str] = set()
    for source, row in json_lines(path, key="answers"):
        try:
            name, texts = str(row["question_id"]), _texts(row)
        except (KeyError, TypeError, IndexError):
            raise UserError(f"{source}: a row needs question_id, and answers (a list of texts), answer (a text) "
                            "or MT-Bench's choices") from None
        if name in found:
            raise UserError(f"{source}: question_id {name} is there twice")
        found[name] = texts
        names |= {str(row[field]) for field in ("model_id", "answerer") if row.get(field)}
    if len(names) > 1:
        raise UserError(f"{path} has answers of several ({', '.join(sorted(names))}): give a file for each")
    given: Given = {}
    for question in questions:
        texts = found.get(question.id, [])
        if len(texts) < len(question.turns):
            raise UserError(f"{path} has {'no answer' if not texts else 'one answer of two'} to question "
                            f"{question.id} ({question.source})")
        given |= {(question.id, turn): Answer(texts[turn]) for turn in range(len(question.turns))}
    return next(iter(names), None), given


def _texts(row: dict[str, Any]) -> list[str]:
    if "choices" in row:
        texts = row["choices"][0]["turns"]
    else:
        texts = next((row[name] for name in ("answers", "turns") if name in row), None) or [row["answer"]]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError
    return texts
