"""`judge` as a user types it: models, endpoints and files answer, a judge on the loopback rates, tables come out."""

import json
import shutil
import signal
import time

import pytest

from ctllm_jax.evaluation.judge.judge import read_judged
from tests.chat_server import ChatServer, Say
from tests.cli.conftest import call
from tests.runs import start

ROWS = [{"question_id": number, "category": category, "turns": turns, **more} for number, (category, turns, more) in
        enumerate([("zh_writing", ["今天", "天气"], {}), ("zh_math", ["我们", "去"], {"reference": ["散步", "公园"]}),
                   ("zh_math", ["不错"], {}), ("zh_writing", ["今天天气不错" * 60], {})])]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "mini bench.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return path


def grade(asked, number):
    """Answers questions, and rates answers: 8 where there is a reference, else 6, and the first of two is better."""
    if asked.body["model"] != "grader":
        return f"答{asked.body['messages'][-1]['content'][:4]}"
    text = asked.body["messages"][:2][-1]["content"]
    return "评分：[[8]]" if "【参考答案】" in text else "[[A]]" if "助手 A" in text else "评分：[[6]]"


def by(server, *words):
    return [f"judge.base_url={server.base_url}", "judge.model=grader", *words]


def answering(server, *words):
    return [f"answers.base_url={server.base_url}", "answers.model=m", *words]


def answers_in(path):
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {row["key"]: row["answer"] for row in rows}


def asked_of(server, model):
    return [asked for asked in server.asked if asked.body["model"] == model]


def test_a_run_is_judged_and_its_result_stands_beside_its_checkpoints(tuned, questions, tmp_path):
    run = shutil.copytree(tuned, tmp_path / "run")
    command = ["judge", run, f"questions={questions}", "answers.max_tokens=12"]
    with ChatServer(grade) as server:
        printed = call(*command, *by(server))
        assert printed.status == 0, printed.err
        folder = next((run / "evaluation").iterdir())
        result = read_judged(folder / "judge-mini_bench.json")
        assert sorted(path.name for path in folder.iterdir()) == [
            f"judge-mini_bench.{kind}" for kind in ("answers.jsonl", "html", "json", "judgments.jsonl", "md")]
        assert result.step == int(folder.name) and result.answerer == f"run@{folder.name}"
        answers = [(turn["answer"], turn["note"], turn["rating"]) for row in result.record["answers"]
                   for turn in row["turns"]]
        # Writing, then math; the last question of writing fits into no context of this model.
        assert answers[2] == ("", "the question leaves no room in the model's context", 1)
        assert sum(bool(text.strip()) for text, _, _ in answers) >= 3
        for (text, _, rating), full in zip(answers, [6, 6, None, 8, 8, 6], strict=True):
            assert rating == (full if text.strip() else 1)
        assert result.record["answerer"]["fingerprint"] and result.record["judge"]["served"] == ["served-model"]
        assert "mean of categories" in printed.out and str(folder / "judge-mini_bench.html") in printed.out
        # Once more: nothing is asked, the same comes out; one checkpoint earlier all is asked anew.
        count = len(server.asked)
        again = call(*command, *by(server))
        assert again.status == 0 and len(server.asked) == count
        assert read_judged(folder / "judge-mini_bench.json")[:12] == result[:12]
        # A trial leaves the whole result alone.
        assert call(*command, *by(server, "limit=1")).status == 0 and len(server.asked) == count
        assert read_judged(folder / "judge-mini_bench.json")[:12] == result[:12]
        part = read_judged(folder / "judge-mini_bench.part.json")
        assert part.record["questions"]["count"] == 2 and part.record["kind"] == "judge-part"
        # And what is answered does not depend on what is answered beside it.
        alone = by(server, "limit=1", "answers.batch_tokens=40", f"output={tmp_path / 'out'}")
        assert call(*command, *alone).status == 0
    whole, part = (answers_in(each / "judge-mini_bench.answers.jsonl") for each in (folder, tmp_path / "out"))
    assert part.items() <= whole.items() and 0 < len(part) < len(whole)


def test_several_answer_and_are_compared(questions, tmp_path):
    output = tmp_path / "judged"
    given = tmp_path / "theirs.jsonl"
    rows = [{"question_id": row["question_id"], "answers": ["别的"] * len(row["turns"])} for row in ROWS]
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ChatServer(grade) as server:
        command = ["judge", given, f"questions={questions}", f"output={output}", "compare=all", *answering(server)]
        printed = call(*command, *by(server, "judge.check=false"))
        assert printed.status == 0, printed.err
        assert not [asked for asked in server.asked if "连接测试" in asked.body["messages"][-1]["content"]]
        comparison = json.loads((output / "judge-mini_bench.comparison.json").read_text("utf-8"))
        (pair,) = comparison["comparisons"]
        # A judge that takes the first place unless it has a reference, to which it gives no choice at all.
        assert (pair["first"], pair["second"]) == ("theirs", "m") and pair["inconsistent"] == pair["first_place"] == 4
        assert pair["consistency"] == 0 and pair["failures"] == 2 and comparison["kind"] == "judge-comparison"
        ours = read_judged(output / "judge-mini_bench.m.json")
        # Writing: three turns of 6. Math: two turns with a reference, 8, and one without.
        assert ours.categories["writing"].mean == 6 and ours.categories["math"].mean == pytest.approx(22 / 3)
        assert ours.macro.mean == pytest.approx(20 / 3) and ours.turns[2].mean == 7
        page = (output / "judge-mini_bench.html").read_text("utf-8")
        assert "theirs" in page and "depends on the order" in page and "别的" in page
        count = len(server.asked)
        files = [output / f"judge-mini_bench.{name}.json" for name in ("theirs", "m")]
        renamed = [shutil.copy(path, tmp_path / f"{path.name}") for path in files]
        # Earlier results answer again, and their judgments are there.
        assert call("judge", *renamed, *command[2:5], *by(server)).status == 0 and len(server.asked) == count
        assert read_judged(files[1]).record["answerer"]["kind"] == "endpoint"


def test_killed_and_started_again_nothing_is_asked_twice(tmp_path):
    questions = tmp_path / "many.jsonl"
    questions.write_text("".join(json.dumps({"category": "写作", "turns": [f"第{number}问", "再问"]}) + "\n"
                                 for number in range(30)))

    def slowly(asked, number):
        return Say(grade(asked, number), delay=0.02)

    with ChatServer(slowly) as server:
        command = ["judge", f"questions={questions}", f"output={tmp_path / 'out'}",
                   *answering(server, "answers.concurrency=1"), *by(server, "judge.concurrency=1")]
        kept = 0
        for name, rows in (("answers", 8), ("answers", 45), ("judgments", 9), ("judgments", 40)):
            process = start(*command)
            path = tmp_path / "out" / f"judge-many.{name}.jsonl"
            until = time.monotonic() + 60
            while not path.exists() or len(path.read_bytes().splitlines()) < rows:
                assert process.poll() is None and time.monotonic() < until, process.communicate()
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait_for_text()
            kept += 1
        with open(path, "ab") as file:
            file.write('{"key": "torn", "text": "半'.encode())
        assert call(*command).status == 0
        answered = [asked.body["messages"] for asked in asked_of(server, "m")]
        judged = [asked.body["messages"][-1]["content"] for asked in asked_of(server, "grader")
                  if "连接测试" not in asked.body["messages"][-1]["content"]]
        # What was on its way when a process was killed was asked in vain; nothing that was kept is asked again.
        assert 60 <= len(answered) <= 60 + kept and 60 <= len(judged) <= 60 + kept
        assert len({json.dumps(each) for each in answered}) == 60 and len(set(judged)) == 60
    result = read_judged(tmp_path / "out" / "judge-many.m.json")
    assert result.micro.rated == 60 and result.micro.failures == 0 and list(result.categories) == ["写作"]


def test_a_judge_that_fails_for_some_is_told_and_asked_again(questions, tmp_path):
    def script(asked, number):
        refused = asked.body["model"] == "grader" and "【参考答案】" in asked.body["messages"][-1]["content"]
        return Say(status=400) if refused else grade(asked, number)

    with ChatServer(script) as server:
        command = ["judge", f"questions={questions}", f"output={tmp_path / 'out'}", *answering(server), *by(server)]
        printed = call(*command)
        assert printed.status == 1 and "2 answers or judgments did not come; the same command asks again" in printed.out
        assert read_judged(tmp_path / "out" / "judge-mini_bench.m.json").micro.missing == 2
        count, server.script = len(server.asked), grade
        # The judge is tried, and asked about those two.
        assert call(*command).status == 0 and len(server.asked) == count + 3
    assert read_judged(tmp_path / "out" / "judge-mini_bench.m.json").micro.failures == 0


def test_a_judge_that_is_away_is_noticed_before_anything_is_answered(questions, tmp_path):
    with ChatServer(grade) as server, ChatServer() as gone:
        address = gone.base_url
        gone.server.server_close()
        printed = call("judge", f"questions={questions}", f"output={tmp_path / 'out'}", *answering(server),
                       f"judge.base_url={address}", "judge.model=grader", "judge.timeout=2")
        assert printed.status == 2 and "the judge cannot be asked, and nothing was begun" in printed.err
        assert not server.asked


def test_a_dry_run_counts_and_shows_a_prompt(questions, tmp_path):
    with ChatServer() as server:
        printed = call("judge", "answers.jsonl", f"questions={questions}", "--dry-run", *by(server))
        assert printed.status == 2 and "there is no answers.jsonl" in printed.err
        printed = call("judge", f"questions={questions}", "--dry-run", *answering(server), *by(server))
        assert printed.status == 0, printed.err
        assert "4 questions, 6 turns, 2 references" in printed.out and "m would be asked 6 times" in printed.out
        assert "would be asked 6 times (ratings 6, choices 0)" in printed.out and "at most 12,288" in printed.out
        assert "prompt single-reference-turn-2" in printed.out or "prompt single" in printed.out
        assert "评分：[[分数]]" in printed.out and not server.asked


ENDPOINT = ["answers.base_url=http://127.0.0.1:1/v1", "answers.model=m"]


@pytest.mark.parametrize(("words", "complaint"), [
    (["judge.modle=x"], "unknown key; did you mean judge.model?"),
    ([*ENDPOINT, "judge.api_key_env=NO_SUCH_KEY"], "api_key_env=NO_SUCH_KEY: there is no such environment variable"),
    (["answers.base_url=http://127.0.0.1:1/v1"], "base_url and model go together"),
    (["answers.name=x"], "name is only read with answers.base_url"), ([], "judge needs someone who answers"),
    ([*ENDPOINT, "answers.top_k=3"], "top_k is only read for a MODEL"),
    ([*ENDPOINT, "compare=all"], "compare=all needs two who answer"),
    (ENDPOINT, "output must be given"),
    ([*ENDPOINT, "answers.temperatures={poetry: 1}"],
     "there is no category poetry"),
    ([*ENDPOINT, "categories=coding"], "there are writing, math"),
    (["runs/none"], "there is no runs/none"), (["questions=none.jsonl"], "judge needs someone"),
    ([*ENDPOINT, "questions=none.jsonl"], "does not exist"),
    (["name=a/b"], "must be of letters"), (["judge.base_url=localhost"], "must begin with http"),
], ids=str)
def test_what_is_wrong_is_said_before_anything_is_asked(words, complaint, questions):
    printed = call("judge", f"questions={questions}", "judge.base_url=http://127.0.0.1:1/v1", "judge.model=x", *words)
    assert printed.status == 2 and complaint in printed.err
