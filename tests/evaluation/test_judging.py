"""A judge on this machine's loopback that fails in every way it can: what is asked again, what counts, what is told."""

import itertools

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.judge import GraderConfig
from ctllm_jax.data.questions import Question
from ctllm_jax.evaluation.judge.answers import Answer
from ctllm_jax.evaluation.judge.judge import compare, comparison_of
from ctllm_jax.evaluation.judge.judging import Judge, Judgment, choices, ratings
from ctllm_jax.evaluation.judge.prompts import PROMPTS
from ctllm_jax.inference.keyed_file import KeyedFile
from tests.chat_server import ChatServer, Say, completion

QUESTIONS = [Question(f"q{number}", "math", (f"第{number}问？",), (), f"set.jsonl:{number + 1}") for number in range(4)]
GIVEN = {(question.id, 0): Answer(f"答{number}") for number, question in enumerate(QUESTIONS)}
OTHER = {(question.id, 0): Answer(f"另答{number}") for number, question in enumerate(QUESTIONS)}
QUICK = {"timeout": 0.5, "retries": 4, "concurrency": 1}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def judge_at(server, **options):
    return Judge(GraderConfig(base_url=server.base_url, model="grader", **{**QUICK, **options}), PROMPTS, backoff=0.01)


def rated(server, path, *, questions=QUESTIONS, given=GIVEN, **options):
    """Judgments by question, all of one turn."""
    judge = judge_at(server, **options)
    items, read = ratings(judge, questions, given)
    with KeyedFile(path) as file:
        judge.ask(items, file=file)
        return {name: found for (name, _), found in read(file).items()}


def results(found):
    return [found[question.id].result for question in QUESTIONS]


def is_follow_up(asked):
    return len(asked.body["messages"]) == 4


def test_what_a_judge_is_sent_and_what_is_kept(tmp_path):
    with ChatServer(lambda asked, number: f"还行。\n评分：[[{5 + number % 5}]]") as server:
        found = rated(server, tmp_path / "rows.jsonl", max_tokens=99)
        assert results(found) == [5, 6, 7, 8] and len(server.asked) == 4
        body = server.asked[0].body
        assert body["temperature"] == 0 and body["max_tokens"] == 99 and body["model"] == "grader"
        assert "第0问？" in body["messages"][1]["content"] and "答0" in body["messages"][1]["content"]
        assert found["q0"] == Judgment(5.0, "还行。\n评分：[[5]]", None, "single")
        # Again, elsewhere: nothing is asked. Another answer, judge or setting is.
        assert results(rated(server, tmp_path / "rows.jsonl", max_tokens=99, timeout=1.0)) == [5, 6, 7, 8]
        assert len(server.asked) == 4
        changed = {**GIVEN, ("q1", 0): Answer("换了")}
        assert results(rated(server, tmp_path / "rows.jsonl", given=changed, max_tokens=99)) == [5, 9, 7, 8]
        rated(server, tmp_path / "rows.jsonl", max_tokens=98)
        assert len(server.asked) == 4 + 1 + 4


def test_a_judge_that_breaks_is_asked_again_until_it_rates(tmp_path):
    trouble = [Say(status=500), Say("慢 [[3]]", delay=1.0), Say("断 [[2]]", cut=True), Say(status=503, body=b"<html>"),
               Say(status=429, headers={"Retry-After": "0.3"}), Say(body=b"{not json")]
    with ChatServer(lambda asked, number: trouble[number] if number < len(trouble) else f"[[{number}]]") as server:
        found = rated(server, tmp_path / "rows.jsonl", retries=6)
    assert results(found) == [6, 7, 8, 9] and len(server.asked) == 10
    after, before = server.asked[5].time, server.asked[4].time
    assert after - before >= 0.3


def test_nonsense_is_asked_once_for_the_rating_alone_and_then_counts_as_failed(tmp_path):
    def script(asked, number):
        text = asked.body["messages"][1]["content"]
        if "第0问" in text:
            return "胡说"
        if "第1问" in text:
            return "[[4]]" if is_follow_up(asked) else "[[100]]"
        if "第2问" in text:
            return "[[8]]" if is_follow_up(asked) else Say(body=completion("还在想 [[3]]", finish="length"))
        return "[[9]]" if len(asked.body["messages"]) == 2 and "没有读到" in text else ""

    with ChatServer(script) as server:
        found = rated(server, tmp_path / "rows.jsonl")
        assert results(found) == [None, 4, 8, 9] and len(server.asked) == 8
        assert found["q0"] == Judgment(None, "胡说", "胡说", "single") and not found["q0"].missing
        follow_up = next(asked.body["messages"] for asked in server.asked if is_follow_up(asked))
        assert follow_up[2] == {"role": "assistant", "content": "胡说"} and "没有读到" in follow_up[3]["content"]
        # What failed has failed: at temperature 0 the same would come.
        assert results(rated(server, tmp_path / "rows.jsonl")) == [None, 4, 8, 9] and len(server.asked) == 8


def test_a_reply_that_is_cut_has_no_rating_and_neither_has_a_follow_up(tmp_path):
    with ChatServer(lambda asked, number: Say(body=completion("解释很长，评分：[[9]]", finish="length"))) as server:
        found = rated(server, tmp_path / "rows.jsonl")
        assert results(found) == [None] * 4 and not any(each.missing for each in found.values())
        assert results(rated(server, tmp_path / "rows.jsonl")) == [None] * 4 and len(server.asked) == 8


def test_who_is_killed_before_the_follow_up_asks_it_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    with ChatServer(lambda asked, number: "[[4]]" if is_follow_up(asked) else "胡说") as server:
        found = rated(server, path, questions=QUESTIONS[:1])
        assert found["q0"].result == 4 and len(server.asked) == 2
        first = path.read_bytes().splitlines(keepends=True)[0]
        path.write_bytes(first + b'{"key": "torn')
        assert rated(server, path, questions=QUESTIONS[:1])["q0"].result == 4
        assert len(server.asked) == 3 and is_follow_up(server.asked[2])


def test_a_request_that_fails_is_missing_and_asked_again(tmp_path):
    def refuse(asked, number):
        return Say(status=400) if "第2问" in asked.body["messages"][1]["content"] else "[[5]]"

    with ChatServer(refuse) as server:
        found = rated(server, tmp_path / "rows.jsonl")
        assert results(found) == [5, 5, None, 5] and found["q2"].missing and found["q2"].text == ""
        server.script = lambda asked, number: "[[6]]"
        assert results(rated(server, tmp_path / "rows.jsonl")) == [5, 5, 6, 5] and len(server.asked) == 5


def test_empty_answers_are_rated_1_and_absent_ones_not_at_all(tmp_path):
    given = {("q0", 0): Answer(" \n", note="无"), ("q1", 0): Answer("答")}
    with ChatServer(lambda asked, number: "[[7]]") as server:
        found = rated(server, tmp_path / "rows.jsonl", given=given)
    assert results(found) == [1, 7, None, None] and len(server.asked) == 1
    assert not found["q0"].missing and found["q2"].missing


def test_equal_answers_share_a_rating(tmp_path):
    given = {**OTHER, ("q0", 0): GIVEN["q0", 0]}
    with ChatServer(lambda asked, number: "[[7]]") as server:
        rated(server, tmp_path / "rows.jsonl")
        rated(server, tmp_path / "rows.jsonl", given=given)
    assert len(server.asked) == 7


def test_the_second_turn_is_rated_with_the_first_in_view(tmp_path):
    question = QUESTIONS[0]._replace(turns=("第一问？", "第二问？"))
    given = {("q0", 0): Answer("第一答"), ("q0", 1): Answer("第二答")}
    with ChatServer(lambda asked, number: f"[[{number + 2}]]") as server:
        judge = judge_at(server)
        items, read = ratings(judge, [question], given)
        with KeyedFile(tmp_path / "rows.jsonl") as file:
            judge.ask(items, file=file)
            found = read(file)
    assert [found["q0", turn].result for turn in (0, 1)] == [2, 3]
    first, second = (asked.body["messages"][1]["content"] for asked in server.asked)
    assert "第二" not in first.replace("第二轮", "") and "第一答" in second and "第二答" in second


def compared(server, path, first=GIVEN, second=OTHER):
    judge = judge_at(server)
    items, read = choices(judge, QUESTIONS, first, second)
    with KeyedFile(path) as file:
        judge.ask(items, file=file)
        return comparison_of("甲", "乙", QUESTIONS, read(file), resamples=200)


def test_a_judge_that_always_prefers_the_first_place_is_never_consistent(tmp_path):
    with ChatServer(lambda asked, number: "[[A]]") as server:
        found = compared(server, tmp_path / "rows.jsonl")
    assert found["consistency"] == 0 and found["win_rate"] is None and found["interval"] is None
    assert found["inconsistent"] == found["first_place"] == 4 and found["second_place"] == 0
    assert len(server.asked) == 8


def test_both_orders_are_asked_and_agree_about_the_better_answer(tmp_path):
    def script(asked, number):
        text = asked.body["messages"][1]["content"]
        return "[[C]]" if "第3问" in text else "[[A]]" if "【助手 A 的回答】\n另答" in text else "[[B]]"

    with ChatServer(script) as server:
        found = compared(server, tmp_path / "rows.jsonl")
        turned = compared(server, tmp_path / "rows.jsonl", OTHER, GIVEN)
    assert [found[name] for name in ("wins", "losses", "ties", "consistency")] == [0, 3, 1, 1.0]
    assert found["win_rate"] == 0.125 and found["interval"][0] == 0.0
    # The other way round it is the same requests.
    assert [turned[name] for name in ("wins", "losses", "ties")] == [3, 0, 1] and len(server.asked) == 8


def test_equal_and_empty_answers_need_no_judge(tmp_path):
    first = {("q0", 0): Answer("同"), ("q1", 0): Answer(""), ("q2", 0): Answer("有"), ("q3", 0): Answer("")}
    second = {("q0", 0): Answer("同 "), ("q1", 0): Answer("有"), ("q2", 0): Answer(""), ("q3", 0): Answer("\n")}
    with ChatServer() as server:
        found = compared(server, tmp_path / "rows.jsonl", first, second)
    assert [row["outcome"] for row in found["rows"]] == ["tie", "loss", "win", "tie"] and not server.asked


@pytest.mark.parametrize(("first", "swapped"), list(itertools.product("ABC", repeat=2)))
def test_two_choices_count_where_they_mean_the_same(first, swapped):
    # Written out by hand: the second one saw the answers the other way round.
    expected = {"AB": "win", "BA": "loss", "CC": "tie"}.get(first + swapped, "inconsistent")
    assert compare(Judgment(first), Judgment(swapped)) == expected
    assert compare(Judgment(first), Judgment(None)) is None


def test_a_judge_that_is_not_there_is_told_at_once():
    with ChatServer() as server:
        address = server.base_url
    judge = Judge(GraderConfig(base_url=address, model="grader"), PROMPTS)
    with pytest.raises(UserError, match="nothing was begun: .*refuses connections"):
        judge.check()
    with pytest.raises(UserError, match="api_key_env=NO_SUCH_KEY: there is no such environment variable"):
        Judge(GraderConfig(base_url=address, model="grader", api_key_env="NO_SUCH_KEY"), PROMPTS)
