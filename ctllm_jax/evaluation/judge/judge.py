"""Scores from a judge's ratings and choices: means with intervals, and a record with all their inputs. No jax.

A record (`judge-NAME.json`) is about one model and has `"kind": "judge"`, or `"judge-part"` for a part of a set;
`read_judged` reads both. The record of a comparison has `"kind": "judge-comparison"`.

An interval is the percentile bootstrap's over questions, at 95 %: questions are drawn with replacement, each with the
ratings of all its turns. For the macro mean, the mean of the categories' means, they are drawn within each category.
An empty answer is rated 1 without a request. If the judge gave no rating, the mean is over the others, and
`mean_if_failures_are_1` is a lower bound.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ctllm_jax.config.errors import UserError
from ctllm_jax.data.questions import Question, in_order, names_of
from ctllm_jax.evaluation.judge.answers import Given
from ctllm_jax.evaluation.judge.judging import Judge, Judgment
from ctllm_jax.evaluation.judge.prompts import Prompt
from ctllm_jax.evaluation.judge.replies import LOWEST
from ctllm_jax.storage import write_whole

KIND, PART, COMPARISON = "judge", "judge-part", "judge-comparison"
_FORMAT = 1
_SEED = 0
_SWAPPED = {"A": "B", "B": "A", "C": "C"}
Judged = dict[tuple[str, int], Judgment]
"""Judgments by the question's id and the turn, from 0."""


class Score(NamedTuple):
    """A mean of ratings.

    Attributes:
      mean: mean of the ratings; None if there are none.
      interval: its 95 % interval; None for fewer than two questions with a rating.
      rated: number of ratings, including those of empty answers.
      failures: number of answers without a rating; `missing` of them have no reply yet, and the same command retries
        them.
      empty: number of empty answers.
      cut: number of answers that the token limit ended.
      mean_if_failures_are_1: a lower bound.
    """

    mean: float | None
    interval: tuple[float, float] | None
    rated: int
    failures: int
    missing: int
    empty: int
    cut: int
    mean_if_failures_are_1: float | None


class Result(NamedTuple):
    """A result from `read_judged`: one model on one set of questions.

    Attributes:
      name, questions_sha256: of the set; equal hashes are equal questions.
      judge: the judge's model; ratings of different judges or `prompts_sha256` are not comparable.
      step: of a run; None of others.
      macro: the mean of the categories' means; micro: of all ratings.
      categories: by name as in `data.questions.CATEGORIES`, in order.
      turns: by number, from 1, of sets of two turns; else empty.
      record: the whole content of the file.
    """

    name: str
    questions_sha256: str
    answerer: str
    step: int | None
    judge: str
    prompts_sha256: str
    date: str
    macro: Score
    micro: Score
    categories: dict[str, Score]
    turns: dict[int, Score]
    record: dict[str, Any]


def bootstrap(groups: Sequence[Sequence[Sequence[float]]], *, resamples: int = 10_000) -> tuple[float, float] | None:
    """The 95 % percentile interval of the mean of the groups' means; with one group, of the mean of all its values.

    Args:
      groups: for each group, for each question, its values. Questions without a value are left out, and so are groups
        without a question. None if no group has two questions.

    Efron 1979, Ann. Statist. 7:1. The draws are the same each time.
    """
    groups = [kept for group in groups if (kept := [values for values in group if values])]
    if not any(len(group) > 1 for group in groups):
        return None
    generator = np.random.default_rng(_SEED)
    means = np.zeros(resamples)
    for group in groups:
        sums = np.array([sum(values) for values in group])
        counts = np.array([len(values) for values in group])
        times = generator.multinomial(len(group), np.full(len(group), 1 / len(group)), size=resamples)
        means += (times @ sums) / (times @ counts) / len(groups)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def scores_of(questions: Sequence[Question], given: Given, judged: Judged, *, resamples: int) -> dict[str, Any]:
    """`macro`, `micro`, `categories` and `turns` as `Score`s of what was judged."""
    categories = {name: [question for question in questions if question.category == name]
                  for name in in_order(question.category for question in questions)}
    turns = max(len(question.turns) for question in questions)

    def score(groups: Iterable[Sequence[Question]], only: int | None = None) -> Score:
        return _score(list(groups), given, judged, only=only, resamples=resamples)

    return {"macro": score(categories.values()), "micro": score([questions]),
            "categories": {name: score([group]) for name, group in categories.items()},
            "turns": {turn + 1: score([questions], turn) for turn in range(turns)} if turns > 1 else {}}


def _score(groups: Sequence[Sequence[Question]], given: Given, judged: Judged, *, only: int | None,
           resamples: int) -> Score:
    values, pessimists, counts = [], [], Counter()
    for group in groups:
        of_group, low = [], []
        for question in group:
            of_question = []
            for turn in range(len(question.turns)) if only is None else [only] if only < len(question.turns) else []:
                answer, said = given.get((question.id, turn)), judged.get((question.id, turn))
                rating = said.result if said else None
                counts["missing"] += said is None or said.missing
                counts["failures"] += rating is None
                counts["empty"] += answer is not None and not answer.text.strip()
                counts["cut"] += answer is not None and answer.is_cut
                low.append(LOWEST if rating is None else rating)
                if rating is not None:
                    of_question.append(rating)
            of_group.append(of_question)
        values.append(of_group)
        pessimists.append(low)
    flat = [[rating for question in group for rating in question] for group in values]
    means = [float(np.mean(ratings)) for ratings in flat if ratings]
    bounds = [float(np.mean(low)) for low in pessimists if low]
    rated = sum(map(len, flat))
    return Score(float(np.mean(means)) if means else None, bootstrap(values, resamples=resamples), rated,
                 counts["failures"], counts["missing"], counts["empty"], counts["cut"],
                 float(np.mean(bounds)) if bounds else None)


def judged_record(head: Mapping[str, Any], questions: Sequence[Question], given: Given, judged: Judged, *,
                  resamples: int, is_part: bool = False) -> dict[str, Any]:
    """The record of one answerer; `head` as of `head_of`, with `answerer`. `is_part`: there are more questions."""
    scores = scores_of(questions, given, judged, resamples=resamples)
    return {"kind": PART if is_part else KIND, "format": _FORMAT, **head,
            "scores": {name: score._asdict() if isinstance(score, Score) else
                       {key: each._asdict() for key, each in score.items()} for name, score in scores.items()},
            "answers": [_row(question, given, judged) for question in questions]}


def head_of(name: str, questions: Sequence[Question], judge: Judge, *, date: str, path: str, sha256: str,
            served: Sequence[str], used: Iterable[Prompt]) -> dict[str, Any]:
    """The common part of the records of one command: the set, the judge, and the text of its prompts."""
    counts = Counter(question.category for question in questions)
    prompts = {prompt.name: prompt for prompt in used}
    return {"name": name, "date": date,
            "questions": {"path": path, "sha256": sha256, "count": len(questions), "categories": {
                category: {"count": counts[category], "names": list(names_of(category))}
                for category in in_order(question.category for question in questions)}},
            "judge": {**judge.identity, "base_url": judge.config.base_url, "served": list(served),
                      "prompts_sha256": prompts_hash(judge),
                      "prompts": {prompt.name: {"sha256": prompt.sha256, **prompt._asdict()}
                                  for prompt in prompts.values()}}}


def prompts_hash(judge: Judge) -> str:
    """Hash of all prompts that a judge may be asked with, 16 hexadecimal digits."""
    return hashlib.sha256("".join(prompt.sha256 for prompt in judge.prompts.values()).encode()).hexdigest()[:16]


def _row(question: Question, given: Given, judged: Judged) -> dict[str, Any]:
    turns = []
    for turn, asked in enumerate(question.turns):
        answer, said = given.get((question.id, turn)), judged.get((question.id, turn))
        turns.append({"question": asked,
                      "reference": question.references[turn] if turn < len(question.references) else None,
                      "answer": answer and answer.text, "is_cut": bool(answer and answer.is_cut),
                      "note": answer and answer.note, "rating": said and said.result,
                      "judgment": said and said.text, "again": said and said.again, "prompt": said and said.prompt})
    return {"question_id": question.id, "category": question.category, "turns": turns}


def compare(first: Judgment, swapped: Judgment) -> str | None:
    """Combine two choices, the second with swapped answers: win, loss or tie of the first model if they agree, else
    inconsistent; None if one of them is missing."""
    if first.result is None or swapped.result is None:
        return None
    if first.result != _SWAPPED[swapped.result]:
        return "inconsistent"
    return {"A": "win", "B": "loss", "C": "tie"}[first.result]


def comparison_of(first: str, second: str, questions: Sequence[Question],
                  said: Mapping[tuple[str, int], tuple[Judgment, Judgment]], *, resamples: int) -> dict[str, Any]:
    """Summarize the choices between two models.

    Returns:
      `wins`, `losses`, `ties` of the first, both orders agreeing; `inconsistent`, of which in `first_place` and
      `second_place` the judge chose the same place twice; `failures`, without a choice; `consistency`, the share of
      those with two choices that agree; `win_rate`, (wins + ties / 2) of those that agree, with its `interval` over
      questions; and `rows`, the choices themselves.
    """
    rows, counts = [], Counter()
    values: dict[str, list[float]] = {question.id: [] for question in questions}
    for question in questions:
        for turn in range(len(question.turns)):
            one, other = said.get((question.id, turn), (Judgment(None, missing=True),) * 2)
            outcome = compare(one, other)
            counts[outcome] += 1
            counts["missing"] += one.missing or other.missing
            if outcome == "inconsistent" and one.result == other.result:
                counts["first_place" if one.result == "A" else "second_place"] += 1
            if outcome in ("win", "loss", "tie"):
                values[question.id].append({"win": 1.0, "loss": 0.0, "tie": 0.5}[outcome])
            rows.append({"question_id": question.id, "category": question.category, "turn": turn + 1,
                         "outcome": outcome, "choices": [each._asdict() for each in (one, other)]})
    agreed = [value for each in values.values() for value in each]
    both = len(agreed) + counts["inconsistent"]
    return {"first": first, "second": second, "wins": counts["win"], "losses": counts["loss"], "ties": counts["tie"],
            "inconsistent": counts["inconsistent"], "first_place": counts["first_place"],
            "second_place": counts["second_place"], "failures": counts[None], "missing": counts["missing"],
            "consistency": len(agreed) / both if both else None,
            "win_rate": float(np.mean(agreed)) if agreed else None,
            "interval": bootstrap([list(values.values())], resamples=resamples), "rows": rows}


def comparison_record(head: Mapping[str, Any], comparisons: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The record of all comparisons of a command."""
    return {"kind": COMPARISON, "format": _FORMAT, **head, "comparisons": list(comparisons)}


def write_record(path: Path, record: Mapping[str, Any]) -> Path:
    """Write a record atomically. Raises UserError on failure."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(record, ensure_ascii=False, indent=1).encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    return path


def read_judged(path: Path | str) -> Result:
    """The result in a file judge-NAME.json.

    Raises:
      UserError: it is not such a file; other files of evaluation/ have no `"kind": "judge"`.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(record, dict) or record.get("kind") not in (KIND, PART):
        found = record.get("kind") if isinstance(record, dict) else None
        raise UserError(f'{path} is no result of judge: it needs "kind": "{KIND}"; this one has {found or "none"}')
    if record.get("format") != _FORMAT:
        raise UserError(f"{path} is of format {record.get('format')}; this version reads {_FORMAT}")
    try:
        scores, answerer, judge = record["scores"], record["answerer"], record["judge"]
        return Result(record["name"], record["questions"]["sha256"], answerer["name"], answerer.get("step"),
                      judge["model"], judge["prompts_sha256"], record["date"], _read(scores["macro"]),
                      _read(scores["micro"]), {name: _read(each) for name, each in scores["categories"].items()},
                      {int(turn): _read(each) for turn, each in scores["turns"].items()}, record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not as judge wrote it: {type(error).__name__} {error}") from None


def _read(score: Mapping[str, Any]) -> Score:
    return Score(**{**score, "interval": score["interval"] and tuple(score["interval"])})
