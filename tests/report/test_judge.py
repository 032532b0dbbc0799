"""The page and the tables of what was judged: all of it, side by side, and deaf to what models and judges write."""

import re

import markdown_it
import pytest

from ctllm_jax.report import judge
from tests.report.test_page import HOSTILE, Page, assert_inert


def score(mean, low=None, high=None, **counts):
    return {"mean": mean, "interval": None if low is None else [low, high], "rated": 2, "failures": 0, "missing": 0,
            "empty": 0, "cut": 0, "mean_if_failures_are_1": mean, **counts}


def turn(asked, answer, rating, **more):
    return {"question": asked, "reference": None, "answer": answer, "is_cut": False, "note": None, "rating": rating,
            "judgment": f"评语 {rating}", "again": None, "prompt": "single", **more}


def record(name, mean, **micro):
    return {
        "kind": "judge", "name": "set", "date": "2026-11-24", "answerer": {"name": name},
        "questions": {"path": "set.jsonl", "sha256": "c0ffee", "count": 2, "categories": {
            "math": {"count": 1, "names": ["math", "数学"]}, "诗词": {"count": 1, "names": ["诗词", ""]}}},
        "judge": {"model": "grader", "served": ["grader", "grader-1"], "temperature": 0.0, "base_url": "http://x/v1",
                  "prompts": {"single": {"name": "single", "sha256": "beef", "system": "评", "template": "{question}",
                                         "again": "再评"}}},
        "scores": {"macro": score(mean, mean - 1, mean + 1), "micro": score(mean, mean - 1.5, mean + 1, **micro),
                   "categories": {"math": score(mean), "诗词": score(None)},
                   "turns": {"1": score(mean), "2": score(2.0)}},
        "answers": [{"question_id": "m1", "category": "math", "turns": [
            turn("一加一？", f"{name} 说二", 7.5, reference="二"),
            turn("再加一？", "", 1.0, note="no room", judgment="")]},
                    {"question_id": "p1", "category": "诗词", "turns": [
                        turn(HOSTILE, HOSTILE, None, judgment=HOSTILE, again="还是不评")]}]}


def comparison():
    choice = {"result": "A", "text": "甲好 [[A]]", "again": None, "prompt": "pair", "missing": False}
    return {"kind": "judge-comparison", "name": "set", "comparisons": [{
        "first": "run@7", "second": "other", "wins": 1, "losses": 0, "ties": 1, "inconsistent": 1, "first_place": 1,
        "second_place": 0, "failures": 0, "missing": 0, "consistency": 2 / 3, "win_rate": 0.75, "interval": [0.5, 1.0],
        "rows": [{"question_id": "m1", "category": "math", "turn": 1, "outcome": "inconsistent",
                  "choices": [choice, choice]}]}]}


RECORDS = [record("run@7", 6.0), record("other", 4.25, failures=2, missing=1, mean_if_failures_are_1=3.1)]


def test_rows_stand_in_order_with_means_and_intervals():
    assert judge.score_rows(RECORDS) == [
        ["math 数学", "1", "6.00", "4.25"], ["诗词", "1", "–", "–"],
        ["mean of categories", "", "6.00 [5.00, 7.00]", "4.25 [3.25, 5.25]"],
        ["mean of all", "2", "6.00 [4.50, 7.00]", "4.25 [2.75, 5.25]"],
        ["  turn 1", "", "6.00", "4.25"], ["  turn 2", "", "2.00", "2.00"]]
    assert judge.count_rows(RECORDS) == [["without a rating", "0", "2"], ["of them still to be asked", "0", "1"],
                                         ["mean of all, if those were rated 1", "6.00", "3.10"]]
    assert judge.comparison_rows(comparison()["comparisons"]) == [
        ["run@7", "other", "1", "1", "0", "75.0% [50.0, 100.0]", "1", "66.7%", "0"]]


def test_markdown_holds_the_tables():
    text = judge.markdown(RECORDS, comparison())
    assert "| mean of categories |  | 6.00 [5.00, 7.00] | 4.25 [3.25, 5.25] |" in text
    assert "| run@7 | other | 1 | 1 | 0 | 75.0% [50.0, 100.0] | 1 | 66.7% | 0 |" in text
    assert "judged by grader (served as grader-1) at temperature 0, 2026-11-24" in text and "single beef" in text


def test_names_in_markdown_are_text():
    """As CommonMark renders it, no name becomes HTML, a link, a new cell or a new line."""
    names = [HOSTILE, "\\<b>x</b>", "a|b\n# c", "[x](http://evil.example)", "![x](javascript:alert(1))", "`<i>`",
             "<http://x>"]
    hostile = [{**record(name, 5.0), "name": name} for name in names]
    for each in hostile:
        each["judge"] = {**each["judge"], "model": each["name"], "served": [each["name"]]}
    text = judge.markdown(hostile, None) + judge.markdown(hostile[::-1], None)
    rendered = markdown_it.MarkdownIt("commonmark").enable("table").render(text)
    assert not re.search("<(img|script|b|i|a|code)\\b", rendered) and "alert(1)" in rendered
    assert rendered.count("<th>") == 2 * (2 + len(names))
    assert rendered.count("<h1>") == 2 and "<li>" not in rendered


@pytest.mark.parametrize("records", [RECORDS, RECORDS[:1]], ids=["two", "one"])
def test_the_page_shows_everything_and_runs_nothing(records):
    html = judge.page(records, comparison() if len(records) > 1 else None)
    page = Page(html)
    assert_inert(page, html)
    said = ["math 数学", "一加一？", "再加一？", "评语 7.5", "no room", "还是不评", "{question}", "再评",
            "6.00", "reference"]
    said += ["other 说二", "depends on the order", "75.0%", "25.0%"] if len(records) > 1 else []
    assert not [words for words in said if words not in page.text]
    bars = [attributes for tag, attributes in page.elements if tag == "rect"]
    assert len(bars) == 2 * len(records)  # a mean of categories and math; nothing was rated in the third group
    widths = [float(bar["width"]) for bar in bars]
    # From 1 to 10 over one width: 6.0 reaches (6 - 1) / 9 of it.
    assert len(records) == 1 or abs(widths[0] / widths[1] - 5.0 / 3.25) < 0.01


def test_a_long_name_is_cut_and_a_part_is_called_one():
    long = {**RECORDS[0], "kind": "judge-part"}
    categories = {"math": {"count": 1, "names": ["一个" + "很长" * 8 + "的类别", ""]},
                  "诗词": {"count": 1, "names": ["x", ""]}}
    long["questions"] = {**long["questions"], "categories": categories}
    assert "一个" + "很长" * 7 + "…" in judge.bars([long])
    assert "2 questions, a part of the set" in judge.notes(long)[0]
