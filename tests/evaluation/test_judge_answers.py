"""Answers of an endpoint and of files: two turns one after the other, each asked for once."""

import json

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.judge import AnswersConfig
from ctllm_jax.data.questions import Question
from ctllm_jax.evaluation.judge.answers import NO_FIRST, Answer, EndpointAnswerer, answer, read_answers
from ctllm_jax.inference.keyed_file import KeyedFile
from tests.chat_server import ChatServer, Say, completion

QUESTIONS = [Question("1", "writing", ("写一", "改一"), (), "set.jsonl:1"),
             Question("2", "math", ("算二", "再算"), ("二", "四"), "set.jsonl:2"),
             Question("3", "hard_case", ("读三",), (), "set.jsonl:3")]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def echo(asked, number):
    return f"答：{asked.body['messages'][-1]['content']}"


def answered(server, path, **options):
    config = AnswersConfig(**{"base_url": server.base_url, "model": "m", "retries": 0, **options})
    counts = []
    with KeyedFile(path) as file:
        given = answer(EndpointAnswerer(config), QUESTIONS, config, file=file, advance=lambda: counts.append(1))
    assert len(counts) == 5
    return given


def test_turns_are_asked_in_turn_at_the_temperature_of_their_category(tmp_path):
    with ChatServer(echo) as server:
        given = answered(server, tmp_path / "rows.jsonl", system="请用中文", concurrency=1)
        assert given["1", 0] == Answer("答：写一") and given["2", 1] == Answer("答：再算") and len(given) == 5
        bodies = [asked.body for asked in server.asked]
        assert [(body["temperature"], len(body["messages"])) for body in bodies] == [
            (0.7, 2), (0.0, 2), (0.7, 2), (0.7, 4), (0.0, 4)]
        assert [message["content"] for message in bodies[4]["messages"]] == ["请用中文", "算二", "答：算二", "再算"]
        assert answered(server, tmp_path / "rows.jsonl", system="请用中文", concurrency=1) == given
        assert len(server.asked) == 5
        # Another temperature for one category asks for that one again.
        answered(server, tmp_path / "rows.jsonl", system="请用中文", temperatures={"zh_math": 0.3})
        assert [asked.body["temperature"] for asked in server.asked[5:]] == [0.3, 0.3]


def test_a_body_may_take_the_temperature_away(tmp_path):
    with ChatServer(echo) as server:
        answered(server, tmp_path / "rows.jsonl", body={"temperature": None})
        assert all("temperature" not in asked.body for asked in server.asked)


def test_what_failed_is_absent_with_all_behind_it_and_asked_for_again(tmp_path):
    def script(asked, number):
        return Say(status=400) if asked.body["messages"][-1]["content"] == "算二" else echo(asked, number)

    with ChatServer(script) as server:
        given = answered(server, tmp_path / "rows.jsonl")
        assert set(given) == {("1", 0), ("1", 1), ("3", 0)}
        before = len(server.asked)
        server.script = echo
        assert len(answered(server, tmp_path / "rows.jsonl")) == 5 and len(server.asked) == before + 2


def test_cut_and_empty_answers_are_marked(tmp_path):
    def script(asked, number):
        text = asked.body["messages"][-1]["content"]
        return Say(body=completion("写到一半", finish="length")) if text == "写一" else "" if text == "算二" else "好"

    with ChatServer(script) as server:
        given = answered(server, tmp_path / "rows.jsonl")
    assert given["1", 0] == Answer("写到一半", True) and given["2", 0] == Answer("")
    assert given["2", 1] == Answer("", note=NO_FIRST) and len(server.asked) == 4
    row = json.loads((tmp_path / "rows.jsonl").read_text("utf-8").splitlines()[0])
    assert row["question_id"] == "1" and row["turn"] == 1 and row["temperature"] == 0.7 and row["by"]["model"] == "m"


ROWS = {"ours": [{"question_id": "1", "answers": ["甲", "乙"], "answerer": "他"},
                 {"question_id": 2, "answers": ["丙", "丁"]}, {"question_id": "3", "answer": "戊"}],
        "mt_bench": [{"question_id": 1, "model_id": "他", "choices": [{"index": 0, "turns": ["甲", "乙"]}]},
                     {"question_id": 2, "model_id": "他", "choices": [{"turns": ["丙", "丁"]}]},
                     {"question_id": 3, "model_id": "他", "choices": [{"turns": ["戊"]}]}]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("layout", ROWS)
def test_answers_of_a_file(layout, tmp_path):
    name, given = read_answers(write(tmp_path / "answers.jsonl", ROWS[layout]), QUESTIONS)
    assert name == "他" and {place: each.text for place, each in given.items()} == {
        ("1", 0): "甲", ("1", 1): "乙", ("2", 0): "丙", ("2", 1): "丁", ("3", 0): "戊"}


@pytest.mark.parametrize(("rows", "complaint"), [
    (ROWS["ours"][:2], r"no answer to question 3 \(set.jsonl:3\)"),
    ([{"question_id": 1, "answer": "甲"}], "one answer of"),
    ([{"answer": "甲"}], ":1: a row needs question_id"), ([{"question_id": 1, "answers": [3]}], ":1: a row needs"),
    ([{"question_id": 1, "choices": []}], ":1: a row needs"),
    ([{"question_id": 1, "answer": "a\ud800"}], ":1: a text holds half of a surrogate pair"),
    (ROWS["ours"] + ROWS["ours"][:1], ":4: .* is there twice"),
    ([{**row, "model_id": str(number)} for number, row in enumerate(ROWS["ours"])], "answers of several"),
], ids=str)
def test_a_file_that_does_not_answer_all(rows, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        read_answers(write(tmp_path / "answers.jsonl", rows), QUESTIONS)
