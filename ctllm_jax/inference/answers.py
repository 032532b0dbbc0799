"""Sources of answers to prompts: a file, an endpoint, or a local MODEL. Only the last imports jax."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ctllm_jax.config.endpoint import EndpointConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pairs import RejectedConfig
from ctllm_jax.data.prompts import Prompt
from ctllm_jax.inference.endpoint import Endpoint, EndpointError, Request

if TYPE_CHECKING:
    from ctllm_jax.inference.engine import Engine

_MOST_SLOTS = 256
_SENT = ("max_tokens", "temperature", "top_p", "body", "send_seed")
logger = logging.getLogger(__name__)


class Task(NamedTuple):
    """A prompt, and the hash of its messages and its answer, 32 hexadecimal digits."""

    prompt: Prompt
    key: str

    @property
    def row_id(self) -> int:
        """32 bits of the key, which seed the random draws for this prompt."""
        return int(self.key[:8], 16)


class Answer(NamedTuple):
    """A text, whether the token limit ended it, and its source, for a row's provenance."""

    text: str
    is_cut: bool
    by: dict[str, Any]


def make_tasks(prompts: Iterable[Prompt]) -> tuple[list[Task], int]:
    """A task for each prompt, in order, and the number of prompts that duplicate an earlier one with its answer."""
    tasks: dict[str, Task] = {}
    copies = 0
    for prompt in prompts:
        content = json.dumps([[message[:2] for message in prompt.messages], prompt.answer])
        key = hashlib.sha256(content.encode()).hexdigest()[:32]
        copies += key in tasks
        tasks.setdefault(key, Task(prompt, key))
    return list(tasks.values()), copies


class Answers(ABC):
    """A source of answers.

    Attributes:
      identity: everything that determines the answers, as JSON.
      name: its name for users.
      at_once: largest number of answers that arrive together.
    """

    identity: dict[str, Any]
    name: str
    at_once: int = 1

    def plan(self, tasks: Sequence[Task]) -> tuple[list[Task], dict[str, int]]:
        """The tasks in the best order for answering, and the number left out, by reason."""
        return list(tasks), {}

    @abstractmethod
    def answer(self, tasks: Sequence[Task], *, ahead: int = 1) -> Iterator[Answer | EndpointError]:
        """Yield the answer to each task, or the reason why there is none.

        Args:
          tasks: some of the planned ones, in their order.
          ahead: number of tasks that may be started before the first answer is taken.
        """


class GivenAnswers(Answers):
    """The answers that are in the prompts' file."""

    identity = {"kind": "data"}
    name = "data"

    def answer(self, tasks: Sequence[Task], *, ahead: int = 1) -> Iterator[Answer]:
        """See `Answers`."""
        for task in tasks:
            yield Answer(task.prompt.answer or "", False, self.identity)


class EndpointAnswers(Answers):
    """The answers of an endpoint; requests are sent ahead. Its address may change."""

    def __init__(self, config: EndpointConfig, *, seed: int):
        self._endpoint = Endpoint(config)
        self._seed = seed
        options = config.model_dump(mode="json", include=set(_SENT))
        self.identity = {"kind": "endpoint", "model": config.model, **{name: options[name] for name in _SENT}}
        self.name = f"{config.model} at {config.base_url}"

    def answer(self, tasks: Sequence[Task], *, ahead: int = 1) -> Iterator[Answer | EndpointError]:
        """See `Answers`."""
        requests = (Request(task.prompt.messages, (task.row_id ^ self._seed) & 0x7FFFFFFF) for task in tasks)
        for reply in self._endpoint.ask_many(requests, ahead=max(ahead, 4 * self._endpoint.config.concurrency)):
            yield reply if isinstance(reply, EndpointError) else Answer(reply.text, reply.is_cut, {
                **self.identity, "model": reply.model, "base_url": self._endpoint.config.base_url})


class ModelAnswers(Answers):
    """The answers of a local MODEL, many at once: when an answer ends, the next prompt starts.

    Args:
      config: of a MODEL, without `base_url`.
      seed: the draws of a row depend only on the seed and the task's key.

    Raises:
      UserError: there is no such model, or it was not trained on dialogues.
    """

    def __init__(self, config: RejectedConfig, *, seed: int):
        from ctllm_jax.inference.model import fingerprint, load_model

        self._config, self._seed = config, seed
        self._model = model = load_model(config.model)
        if model.template is None:
            raise UserError(f"rejected.model={config.model} was not taught to answer: it has no chat template. `sft` "
                            "teaches it")
        self._engine: Engine | None = None
        self._prompts: dict[str, list[int]] = {}
        self._context = model.decoder.config.context_length
        self.name = f"{config.model}, step {model.step:,}"
        options = config.model_dump(mode="json", include={"max_tokens", "temperature", "top_k", "top_p"})
        self.identity = {"kind": "model", "step": model.step, "fingerprint": fingerprint(model), **options}

    def plan(self, tasks: Sequence[Task]) -> tuple[list[Task], dict[str, int]]:
        """See `Answers`; in the given order. A prompt is left out if the template refuses it, or the context is too
        short."""
        planned: list[Task] = []
        dropped: Counter[str] = Counter()
        for task in tasks:
            try:
                ids = self._model.template.prompt_ids(task.prompt.messages)
            except UserError as error:
                logger.info("%s:%d is left out: %s", task.prompt.file, task.prompt.row, error)
                dropped["refused by the chat template"] += 1
                continue
            if len(ids) + self._config.min_room > self._context:
                dropped["prompt leaves no room"] += 1
                continue
            self._prompts[task.key] = ids
            planned.append(task)
        longest = max((len(ids) + self._room(ids) for ids in self._prompts.values()), default=1)
        slots = min(max(1, self._config.batch_tokens // longest), _MOST_SLOTS, max(1, len(planned)))
        if planned:
            self._engine = self._model.engine(slots=slots, max_length=longest)
        self.at_once = 2 * slots
        return planned, dict(dropped)

    def answer(self, tasks: Sequence[Task], *, ahead: int = 1) -> Iterator[Answer]:
        """See `Answers`."""
        from ctllm_jax.inference.request import Request

        config, model = self._config, self._model
        requests = (Request(prompt=tuple(ids), max_tokens=self._room(ids), temperature=config.temperature,
                            top_k=config.top_k, top_p=1.0 if config.top_p is None else config.top_p,
                            stop_ids=model.stop_ids, seed=self._seed, row=task.row_id)
                    for task in tasks for ids in [self._prompts[task.key]])
        for _, text, finish in self._engine.run(requests, ahead=max(ahead, self.at_once)):
            is_cut = finish == "length"
            # A character that is cut after its first bytes.
            yield Answer(text.rstrip("\ufffd") if is_cut else text, is_cut, {**self.identity, "model": config.model})

    def _room(self, ids: Sequence[int]) -> int:
        """Largest number of new tokens after a prompt."""
        return min(self._config.max_tokens, self._context - len(ids))
