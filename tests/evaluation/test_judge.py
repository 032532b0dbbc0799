"""Means, their intervals against SciPy's bootstrap, failures that are not dropped, and records that are read back."""

import json

import numpy as np
import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.judge import GraderConfig
from ctllm_jax.data.questions import Question
from ctllm_jax.evaluation.judge import judge
from ctllm_jax.evaluation.judge.answers import Answer
from ctllm_jax.evaluation.judge.judge import Score, bootstrap, judged_record, read_judged, scores_of, write_record
from ctllm_jax.evaluation.judge.judging import Judge, Judgment
from ctllm_jax.evaluation.judge.prompts import PROMPTS

HEAD = {"name": "set", "date": "2026-11-24", "answerer": {"name": "run@7", "step": 7},
        "questions": {"path": "set.jsonl", "sha256": "c0ffee", "count": 3,
                      "categories": {"math": {"count": 2, "names": ["math", "数学"]},
                                     "coding": {"count": 1, "names": ["coding", "编程"]}}},
        "judge": {"model": "grader", "prompts_sha256": "abad1dea", "served": [], "temperature": 0.0, "prompts": {}}}


def question(name, category="math", turns=1):
    return Question(name, category, tuple(f"{name}，第{turn}问？" for turn in range(turns)), (), "set.jsonl:1")


def scored(questions, rated, given=None):
    judged = {place: Judgment(rating) for place, rating in rated.items()}
    given = given or {place: Answer("答") for place in rated}
    return scores_of(questions, given, judged, resamples=500)


def scipys(data, statistic, **how):
    stats = pytest.importorskip("scipy.stats")
    found = stats.bootstrap(data, statistic, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1),
                            **how).confidence_interval
    return (found.low, found.high)


def test_intervals_of_a_mean_are_scipys():
    ratings = np.random.default_rng(7).integers(1, 11, 33).astype(float)
    ours = bootstrap([[[value] for value in ratings]], resamples=20_000)
    assert np.allclose(ours, scipys((ratings,), np.mean), atol=0.05)
    # And nearly those of the normal distribution, by the closed form.
    half = 1.96 * ratings.std() / np.sqrt(len(ratings))
    assert np.allclose(ours, (ratings.mean() - half, ratings.mean() + half), atol=0.1)


def test_intervals_of_two_turns_are_of_questions_and_so_wider():
    draw = np.random.default_rng(8)
    first = draw.integers(1, 11, 40).astype(float)
    pairs = [[value, value] if number % 3 else [value] for number, value in enumerate(first)]
    sums, counts = np.array([sum(pair) for pair in pairs]), np.array([float(len(pair)) for pair in pairs])
    theirs = scipys((sums, counts), lambda x, n, axis: x.sum(axis=axis) / n.sum(axis=axis), paired=True)
    ours = bootstrap([pairs], resamples=20_000)
    assert np.allclose(ours, theirs, atol=0.05)
    apart = bootstrap([[[value] for pair in pairs for value in pair]])
    assert ours[1] - ours[0] > 1.2 * (apart[1] - apart[0])


def test_intervals_of_the_mean_of_categories_draw_within_each():
    draw = np.random.default_rng(9)
    groups = [draw.uniform(1, 10, size) for size in (33, 20, 37)]

    def statistic(*samples, axis):
        return sum(sample.mean(axis=axis) for sample in samples) / len(samples)

    ours = bootstrap([[[value] for value in group] for group in groups], resamples=20_000)
    assert np.allclose(ours, scipys(tuple(groups), statistic), atol=0.05)


def test_few_questions_have_no_interval_and_the_same_ones_always_the_same():
    assert bootstrap([[[5.0]], [[3.0, 4.0]]]) is None and bootstrap([]) is None and bootstrap([[[], []]]) is None
    assert bootstrap([[[5.0], [], [5.0]], [[2.0]]]) == (3.5, 3.5)
    values = [[[float(value)] for value in range(1, 11)]]
    assert bootstrap(values) == bootstrap(values)


def test_means_weigh_categories_or_ratings():
    questions = [question("a"), question("b"), question("c", "coding")]
    scores = scored(questions, {("a", 0): 4.0, ("b", 0): 6.0, ("c", 0): 8.0})
    assert scores["macro"].mean == 6.5 and scores["micro"].mean == 6.0 and scores["turns"] == {}
    assert {name: score.mean for name, score in scores["categories"].items()} == {"math": 5.0, "coding": 8.0}
    low, high = scores["micro"].interval
    assert low < 6 < high and scores["categories"]["coding"].interval is None


def test_failures_are_counted_and_bounded():
    questions = [question("a"), question("b"), question("c", "coding"), question("d", "coding")]
    given = {("a", 0): Answer("答"), ("b", 0): Answer("", note="no room"), ("c", 0): Answer("答", is_cut=True)}
    scores = scores_of(questions, given, {("a", 0): Judgment(9.0), ("b", 0): Judgment(1.0), ("c", 0): Judgment(None),
                                          ("d", 0): Judgment(None, missing=True)}, resamples=500)
    assert scores["micro"][0] == 5.0 and scores["micro"][2:] == (2, 2, 1, 1, 1, 3.0)
    assert scores["macro"].mean == 5.0 and scores["macro"].mean_if_failures_are_1 == 3.0
    assert scores["categories"]["coding"] == Score(None, None, 0, 2, 1, 0, 1, 1.0)


def test_turns_have_means_of_their_own():
    questions = [question("a", turns=2), question("b", turns=2), question("c", "coding")]
    scores = scored(questions, {("a", 0): 8.0, ("a", 1): 2.0, ("b", 0): 6.0, ("b", 1): 4.0, ("c", 0): 10.0})
    assert [scores["turns"][turn].mean for turn in (1, 2)] == [8.0, 3.0] and scores["turns"][2].rated == 2
    assert scores["categories"]["math"].mean == 5.0 and scores["micro"].mean == 6.0


def test_a_record_is_read_back(tmp_path):
    questions = [question("a"), question("b"), question("c", "coding")]
    given = {(each.id, 0): Answer("答") for each in questions}
    judged = {("a", 0): Judgment(4.0, "差 [[4]]", None, "single"), ("b", 0): Judgment(6.5), ("c", 0): Judgment(None)}
    path = write_record(tmp_path / "evaluation" / "7" / "judge-set.json",
                        judged_record(HEAD, questions, given, judged, resamples=500))
    assert [each.name for each in path.parent.iterdir()] == ["judge-set.json"]
    found = read_judged(path)
    assert found[:7] == ("set", "c0ffee", "run@7", 7, "grader", "abad1dea", "2026-11-24")
    assert found.macro == found.categories["math"]._replace(failures=1, mean_if_failures_are_1=3.125)
    assert found.micro.mean == 5.25 and found.micro.failures == 1 and found.turns == {}
    assert found.micro == scores_of(questions, given, judged, resamples=500)["micro"]
    turn = found.record["answers"][0]["turns"][0]
    assert turn["rating"] == 4.0 and turn["judgment"] == "差 [[4]]" and turn["question"] == "a，第0问？"


@pytest.mark.parametrize(("content", "complaint"), [
    ("{", "cannot be read"), ("[]", "this one has none"), ('{"kind": "harness"}', "this one has harness"),
    ('{"kind": "judge", "format": 2}', "is of format 2"), ('{"kind": "judge", "format": 1}', "not as judge wrote it"),
])
def test_what_is_no_record_is_said(content, complaint, tmp_path):
    path = tmp_path / "judge-set.json"
    path.write_text(content)
    with pytest.raises(UserError, match=complaint):
        read_judged(path)


def test_a_head_holds_the_judge_and_its_words_but_no_key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    asked = Judge(GraderConfig(base_url="http://127.0.0.1:1/v1", model="grader", api_key_env="JUDGE_KEY"), PROMPTS)
    head = judge.head_of("set", [question("a")], asked, date="2026-11-24", path="set.jsonl", sha256="c0ffee",
                         served=["grader-2"], used=[PROMPTS["single", False, False]])
    assert "sk-secret" not in json.dumps(head) and head["judge"]["temperature"] == 0 and head["judge"]["top_p"] is None
    prompt = head["judge"]["prompts"]["single"]
    assert prompt["template"] == PROMPTS["single", False, False].template and len(prompt["sha256"]) == 16
    assert head["questions"]["categories"] == {"math": {"count": 1, "names": ["math", "数学"]}}
