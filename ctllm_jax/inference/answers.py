"""Who answers a prompt: a file, an endpoint, or a MODEL of ours. jax is imported by the last alone."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ctllm_jax.config.endpoint import EndpointConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pairs import RejectedConfig
from ctllm_jax.data.prompts import Prompt
from ctllm_jax.inference.endpoint import Endpoint, EndpointError, Request

_SENT = ("max_tokens", "temperature", "top_p", "body", "send_seed")
logger = logging.getLogger(__name__)


class Task(NamedTuple):
    """A prompt, and the hash of its messages and its answer, 32 hexadecimal digits."""

    prompt: Prompt
    key: str

    @property
    def row_id(self) -> int:
        """32 bits of the key, from which the draws for this prompt follow."""
        return int(self.key[:8], 16)


class Answer(NamedTuple):
    """A text, whether a limit on tokens ended it, and who gave it, as it goes into a row's provenance."""

    text: str
    is_cut: bool
    by: dict[str, Any]


def make_tasks(prompts: Iterable[Prompt]) -> tuple[list[Task], int]:
    """A task for each prompt, in their order, and how many prompts were copies of an earlier one with its answer."""
    tasks: dict[str, Task] = {}
    copies = 0
    for prompt in prompts:
        content = json.dumps([[message[:2] for message in prompt.messages], prompt.answer])
        key = hashlib.sha256(content.encode()).hexdigest()[:32]
        copies += key in tasks
        tasks.setdefault(key, Task(prompt, key))
    return list(tasks.values()), copies


class _Batch(NamedTuple):
    """Tasks that are generated together: `rows` of prompts padded to `size` tokens, filled up where there are fewer."""

    tasks: list[Task]
    rows: int
    size: int


class Answers(ABC):
    """One who answers.

    Attributes:
      identity: all that decides the answers, as JSON.
      name: what people call it.
      at_once: answers that come together, at most.
    """

    identity: dict[str, Any]
    name: str
    at_once: int = 1

    def plan(self, tasks: Sequence[Task]) -> tuple[list[Task], dict[str, int]]:
        """The tasks in the order in which they are answered best, and how many are left out, by reason."""
        return list(tasks), {}

    @abstractmethod
    def answer(self, tasks: Sequence[Task], *, ahead: int = 1) -> Iterator[Answer | EndpointError]:
        """The answer to each task, or why there is none.

        Args:
          tasks: some of the planned ones, in their order.
          ahead: answers that are taken together: so many are worked on before the first is taken, where that helps.
        """


class GivenAnswers(Answers):
    """The answers that the prompts came with."""

    identity = {"kind": "data"}
    name = "data"

    def answer(self, tasks: Sequence[Task], *, ahead: int = 1) -> Iterator[Answer]:
        """See `Answers`."""
        for task in tasks:
            yield Answer(task.prompt.answer or "", False, self.identity)


class EndpointAnswers(Answers):
    """The answers of an endpoint; requests are sent ahead of those that are taken. Its address may change."""

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
    """The answers of a MODEL of ours, generated in batches of prompts of about one length.

    A batch is the same whatever of it is there already, so that a row has the same bits wherever the work was stopped.

    Args:
      config: of a MODEL, without `base_url`.
      seed: a row's draws depend on it and the task's key alone.

    Raises:
      UserError: no such model, or it was not taught to answer.
    """

    def __init__(self, config: RejectedConfig, *, seed: int):
        from ctllm_jax.inference.model import load_model

        self._config, self._seed = config, seed
        self._model = model = load_model(config.model)
        if model.template is None:
            raise UserError(f"rejected.model={config.model} was not taught to answer: it has no chat template. `sft` "
                            "teaches it")
        self._batches: list[_Batch] = []
        self._prompts: dict[str, list[int]] = {}
        self._context = model.decoder.config.context_length
        self.name = f"{config.model}, step {model.step:,}"
        options = config.model_dump(mode="json", include={"max_tokens", "temperature", "top_k", "top_p"})
        self.identity = {"kind": "model", "step": model.step, "fingerprint": _fingerprint(model), **options}

    def plan(self, tasks: Sequence[Task]) -> tuple[list[Task], dict[str, int]]:
        """See `Answers`: by padded length, then as they came. The template or the context may refuse a prompt."""
        by_size: dict[int, list[Task]] = {size: [] for size in _padded_sizes(self._context)}
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
            by_size[next(size for size in by_size if size >= len(ids))].append(task)
        self._batches = []
        for size, same in by_size.items():
            rows = min(max(1, self._config.batch_tokens // (size + self._most_new(size))), len(same))
            self._batches += [_Batch(same[start:start + rows], rows, size) for start in range(0, len(same), rows or 1)]
        self.at_once = max((batch.rows for batch in self._batches), default=1)
        return [task for batch in self._batches for task in batch.tasks], dict(dropped)

    def answer(self, tasks: Sequence[Task], *, ahead: int = 1) -> Iterator[Answer]:
        """See `Answers`."""
        wanted = {task.key for task in tasks}
        for batch in self._batches:
            if not wanted.isdisjoint(task.key for task in batch.tasks):
                for task, answer in zip(batch.tasks, self._generate(batch), strict=True):
                    if task.key in wanted:
                        yield answer

    def _most_new(self, size: int) -> int:
        """Most new tokens behind a prompt that is padded to `size`."""
        sizes = [0, *_padded_sizes(self._context)]
        return min(self._config.max_tokens, self._context - sizes[sizes.index(size) - 1] - 1)

    def _generate(self, batch: _Batch) -> list[Answer]:
        from ctllm_jax.inference.generate import generate

        config, model = self._config, self._model
        # The last batch of a length is filled up with its first row: one compiled program a length.
        filled = [*batch.tasks, *[batch.tasks[0]] * (batch.rows - len(batch.tasks))]
        new = generate(model.decoder, model.params, [self._prompts[task.key] for task in filled],
                       max_tokens=self._most_new(batch.size), seed=self._seed, temperature=config.temperature,
                       top_k=config.top_k, top_p=1.0 if config.top_p is None else config.top_p,
                       stop_ids=model.stop_ids, row_ids=[task.row_id for task in filled], pad_to=batch.size)
        answers = []
        for task, ids in zip(batch.tasks, new, strict=False):
            room = min(config.max_tokens, self._context - len(self._prompts[task.key]))
            text = model.tokenizer.decode(ids[:room])
            is_cut = len(ids) >= room
            # A character of which only the first bytes were reached.
            answers.append(Answer(text.rstrip("\ufffd") if is_cut else text, is_cut,
                                  {**self.identity, "model": config.model}))
        return answers


def _padded_sizes(context: int) -> list[int]:
    """Lengths that prompts are padded to: powers of two, and the context, each a multiple of `PROMPT_BUCKET`."""
    from ctllm_jax.inference.generate import PROMPT_BUCKET

    sizes = [PROMPT_BUCKET]
    while sizes[-1] * 2 < context:
        sizes.append(sizes[-1] * 2)
    return [*sizes, -(-context // PROMPT_BUCKET) * PROMPT_BUCKET] if sizes[-1] < context else sizes


def _fingerprint(model: Any) -> str:
    """Hash of weights, architecture, tokenizer and template, 16 hexadecimal digits."""
    import jax
    import numpy as np

    digest = hashlib.sha256(json.dumps([model.decoder.config.model_dump(mode="json"), model.tokenizer.sha256,
                                        model.template.fingerprint()], sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    return digest.hexdigest()[:16]
