"""SQuAD 2.0 with lm-eval's prompts, and the official score computed here.

lm-eval takes the score from a script that it loads from the network.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ctllm_jax.evaluation.sources import Source

if TYPE_CHECKING:
    from lm_eval.api.task import Task

METRICS = ("exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1", "best_exact", "best_f1")
Item = tuple[Mapping[str, Any], Mapping[str, Any]]
"""(prediction, reference) of a question, as lm-eval's task makes them."""


def open_squad(source: Source) -> Task:
    """lm-eval's task over local questions."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks.squadv2.task import SQuAD2

    class LocalSQuAD2(SQuAD2):
        def __init__(self):
            ConfigurableTask.__init__(self, config={
                "task": "squadv2", "custom_dataset": source, "metadata": {"version": self.VERSION},
                "generation_kwargs": {"until": ["\n"]}})

        def aggregation(self):
            return {name: partial(score, name) for name in METRICS}

    return LocalSQuAD2()


def score(name: str, items: Sequence[Item]) -> float:
    """One of the official scores of SQuAD 2.0 (arXiv 1806.03822), in percent; 0 where no question counts.

    `best_…` is that of the best threshold on the probability of "unanswerable", above which a question counts as
    declined.
    """
    kind = name.partition("_")[2] or name
    scored = [(_score_one(kind, prediction["prediction_text"], reference["answers"]["text"]),
               bool(reference["answers"]["text"])) for prediction, reference in items]
    if name.startswith("best"):
        return _best(scored, [prediction for prediction, _ in items])
    if name.startswith(("HasAns", "NoAns")):
        scored = [one for one in scored if one[1] == name.startswith("HasAns")]
    return 100.0 * sum(one[0] for one in scored) / len(scored) if scored else 0.0


def _best(scored: Sequence[tuple[float, bool]], predictions: Sequence[Mapping[str, Any]]) -> float:
    """The best sum over thresholds: all questions declined, then answered in the order of their probability."""
    current = best = float(sum(not has_answer for _, has_answer in scored))
    for (value, has_answer), prediction in sorted(zip(scored, predictions, strict=True),
                                                  key=lambda pair: pair[1]["no_answer_probability"]):
        # An empty answer counts the same as a declined question.
        current += value if has_answer else -1.0 if prediction["prediction_text"] else 0.0
        best = max(best, current)
    return 100.0 * best / len(scored)


def _score_one(kind: str, predicted: str, answers: Sequence[str]) -> float:
    golds = [answer for answer in answers if _normalize(answer)] or [""]
    compare = _exact if kind == "exact" else _f1
    return max(compare(gold, predicted) for gold in golds)


def _exact(gold: str, predicted: str) -> float:
    return float(_normalize(gold) == _normalize(predicted))


def _f1(gold: str, predicted: str) -> float:
    golds, words = _normalize(gold).split(), _normalize(predicted).split()
    if not golds or not words:
        return float(golds == words)
    common = sum((Counter(golds) & Counter(words)).values())
    return 2.0 * common / (len(golds) + len(words))


def _normalize(text: str) -> str:
    """Lower case, without punctuation and articles, with single spaces."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())
