"""The verdict on the page: what the file says, and no more; a file that is no verdict is said and left out."""

import json

import pytest

from ctllm_jax.report import sentiment
from ctllm_jax.report.run import read_run
from tests.report.test_page import HOSTILE, assert_inert, page_of


def share_of(value, low, high, count=300):
    return {"share": value, "interval": [low, high], "count": count}


VERDICT = {
    "made_of": {"samples": 300}, "judge": "snownlp 0.12.3",
    "figures": {model: {"positive": positive, "distinct": 0.99, "commonest": 0.01, "distinct_bigrams": bigrams,
                        "characters": 33.25, "ended": 1.0, "copied": 0.0}
                for model, positive, bigrams in (("sft", share_of(0.5, 0.444, 0.556), 0.44),
                                                 ("dpo", share_of(0.9, 0.861, 0.929), 0.15))},
    "held_out_pairs": share_of(0.85, 0.75, 0.92, 68),
    "calibration": {"agreement": share_of(0.83, 0.79, 0.87, 350), "of_positive": share_of(0.78, 0.71, 0.84, 148),
                    "of_negative": share_of(0.13, 0.09, 0.19, 202)},
    "samples": [{"prompt": f"写一条评论{number}。", "sft": {"text": "太吵了", "positive": False},
                 "dpo": {"text": f"很满意{number}", "positive": True}} for number in range(40)],
}


@pytest.fixture
def judged(finished):
    """A finished run that has a verdict."""
    (finished / "sentiment.json").write_text(json.dumps(VERDICT), encoding="utf-8")
    return finished


def test_figures_stand_beside_each_other_with_their_intervals():
    rows = {name: figures for name, *figures in sentiment.figures(VERDICT)}
    assert sentiment.models(VERDICT) == ["sft", "dpo"]
    assert rows["judged positive"] == ["50.0% [44.4, 55.6]", "90.0% [86.1, 92.9]"]
    assert rows["different pairs of characters"] == ["44.0%", "15.0%"] and rows["characters, mean"] == ["33.2", "33.2"]


def test_remarks_say_what_the_judge_is_worth():
    first, second = sentiment.remarks(VERDICT)
    for words in ("snownlp 0.12.3", "83.0% [79.0, 87.0] of 350 held-out reviews", "78.0%", "13.0%", "trained on all"):
        assert words in first
    assert "85.0% [75.0, 92.0] of 68 held-out pairs" in second


def test_the_page_has_the_section_and_the_first_answers(judged, tmp_path):
    html, page = page_of(tmp_path, judged)
    assert "Sentiment of what it writes" in page.text and "90.0% [86.1, 92.9]" in page.text
    assert "很满意11" in page.text and "很满意12" not in page.text and "太吵了" in page.text
    assert_inert(page, html)


def test_a_run_without_one_has_no_section(finished, tmp_path):
    _, page = page_of(tmp_path, finished)
    assert "Sentiment" not in page.text


def test_answers_can_do_nothing_on_the_page(finished, tmp_path):
    sample = {"prompt": HOSTILE, "sft": {"text": HOSTILE, "positive": True}, "dpo": {"text": HOSTILE}}
    (finished / "sentiment.json").write_text(json.dumps(VERDICT | {"samples": [sample], "judge": HOSTILE}))
    html, page = page_of(tmp_path, finished)
    assert_inert(page, html)


@pytest.mark.parametrize("verdict", [
    {"figures": {"sft": None, "dpo": {"positive": {"share": "x"}}}, "samples": [1, {}]},
    {"figures": 3, "calibration": [], "held_out_pairs": {"share": 0.5}}, {"samples": {"a": 1}}, {"samples": 5}])
def test_half_a_verdict_is_shown_as_far_as_it_goes(finished, tmp_path, verdict):
    (finished / "sentiment.json").write_text(json.dumps(verdict))
    _, page = page_of(tmp_path, finished)
    assert "Sentiment of what it writes" in page.text and "–" in page.text


@pytest.mark.parametrize(("text", "problem"), [("{", "not JSON"), ("[1]", "not a JSON object")])
def test_a_file_that_is_no_verdict_is_a_problem_that_is_said(finished, text, problem):
    (finished / "sentiment.json").write_text(text)
    run = read_run(finished)
    assert run.sentiment == {} and run.problems[-1] == f"sentiment.json: {problem}; left out"
