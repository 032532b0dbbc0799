"""Make preference pairs: for each prompt, an answer from each of two sources, the better source's as chosen. No jax.

The recipe of CT-LLM's synthetic pairs (arXiv 2404.04167): GPT-4 gives the chosen answers, a weaker model the rejected.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from ctllm_jax.config.pairs import PairsConfig
from ctllm_jax.inference.answers import Answer, Answers, Task
from ctllm_jax.inference.endpoint import EndpointError
from ctllm_jax.inference.pair_file import PairFile

_SHOWN = 3  # number of failures that are logged in full
logger = logging.getLogger(__name__)


def settings_of(config: PairsConfig, chosen: Answers, rejected: Answers) -> dict[str, Any]:
    """Everything that determines the rows of an output except the prompts, as JSON."""
    return {"chosen": chosen.identity, "rejected": rejected.identity, "seed": config.seed,
            "cut_answers": config.cut_answers}


def make_pairs(config: PairsConfig, tasks: Sequence[Task], *, chosen: Answers, rejected: Answers, file: PairFile,
               advance: Callable[[], None] = lambda: None) -> int:
    """Ask both sources for every task that `file` lacks, and append the pairs; `advance` is called for each task.

    Args:
      tasks: from `rejected.plan`.

    Returns:
      Tasks without an answer. They are not recorded, so the next call retries them.

    Raises:
      EndpointError: an endpoint that gives none.
    """
    wanted = [task for task in tasks if task.key not in file.done]
    failed = 0
    with (closing(chosen.answer(wanted, ahead=rejected.at_once)) as better,
          closing(rejected.answer(wanted, ahead=chosen.at_once)) as worse):
        for task, good, bad in zip(wanted, better, worse, strict=True):
            source = f"{task.prompt.file}:{task.prompt.row}"
            if error := next((answer for answer in (good, bad) if isinstance(answer, EndpointError)), None):
                failed += 1
                logger.log(logging.WARNING if failed <= _SHOWN else logging.INFO, "%s has no pair: %s", source, error)
            elif reason := _unfit(good, bad, config.cut_answers):
                file.drop(task.key, source, reason)
            else:
                file.add(task.key, _row(task, good, bad, source=source, date=file.date, seed=config.seed))
            advance()
    return failed


def _unfit(good: Answer, bad: Answer, cut_answers: str) -> str | None:
    """The reason why two answers make no pair, or None."""
    chosen, rejected = good.text.split(), bad.text.split()
    if not chosen or not rejected:
        return "an empty answer"
    if chosen == rejected:
        return "equal answers"
    if good.is_cut and cut_answers != "keep" or bad.is_cut and cut_answers == "drop":
        return "an answer cut by max_tokens"
    return None


def _row(task: Task, good: Answer, bad: Answer, *, source: str, date: str, seed: int) -> dict[str, Any]:
    """A pair in TRL's conversational layout, with the origin of its parts."""
    return {"prompt": [{"role": message.role, "content": message.content} for message in task.prompt.messages],
            "chosen": [{"role": "assistant", "content": good.text}],
            "rejected": [{"role": "assistant", "content": bad.text}],
            "provenance": {"key": task.key, "source": source, "date": date, "seed": seed,
                           "chosen": {**good.by, "is_cut": good.is_cut},
                           "rejected": {**bad.by, "is_cut": bad.is_cut}}}
