"""`pairs` as a user types it: a MODEL of ours or an endpoint gives the worse answers, and `dpo` takes what comes."""

import json
import signal
import time

import pytest

from ctllm_jax.data.pairs import read_pairs
from ctllm_jax.report.run import read_run
from tests.chat_server import KEY, ChatServer, Say, completion
from tests.cli.conftest import call
from tests.runs import start

LONG = "今天天气不错" * 60


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    """Fifty rows: short and longer prompts, several turns, a system prompt; a copy, an overlong and an open one."""
    def turns(*texts):
        roles = ["user", "assistant"] * len(texts)
        return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]

    rows = [{"messages": turns("今天" * (1 + index % 15) + str(index), "我们去公园。")} for index in range(44)]
    rows += [{"messages": [{"role": "system", "content": "不错"}, *turns("今天", "天气", "我们", "去公园。", "还")]}]
    rows += [{"messages": turns("今天", "天气", "公园", "散步。")}, rows[0], {"messages": turns(LONG, "好")},
             {"messages": turns("今天")}, {"messages": turns("天气", "好")}]
    path = tmp_path_factory.mktemp("dialogues") / "zh.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def command(tuned, dialogues):
    """All but the output."""
    return ["pairs", f"data={dialogues}", f"rejected={tuned}", "rejected.max_tokens=24", "rejected.temperature=1",
            "seed=5"]


@pytest.fixture(scope="module")
def made(command, tmp_path_factory):
    """(the output, what the command printed)."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    printed = call(*command, f"output={path}")
    assert printed.status == 0, printed.err
    return path, printed


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sources(path):
    return [int(row["provenance"]["source"].rpartition(":")[2]) for row in read(path)]


def in_table(printed):
    """The table at the end: words -> number."""
    rows = [line.rsplit(None, 1) for line in printed.out.splitlines() if line.strip()[-1:].isdigit()]
    return {words.strip(): int(number.replace(",", "")) for words, number in rows if number.replace(",", "").isdigit()}


def test_every_prompt_has_its_pair_and_says_where_it_is_from(made, tuned, dialogues):
    path, printed = made
    rows = read(path)
    table = in_table(printed)
    kept = table["pairs"]
    assert kept == len(rows) > 40 and table["read"] == 50
    assert table["copy of an earlier row"] == table["prompt leaves no room"] == table["no answer"] == 1
    assert kept + table.get("an empty answer", 0) + table.get("equal answers", 0) == 47
    assert f"next: python launch.py dpo CONFIG init={tuned} data={path}" in printed.out
    assert len({row["provenance"]["key"] for row in rows}) == kept and len(set(sources(path))) == kept
    given = read(dialogues)
    for row, line in zip(rows, sources(path), strict=True):
        messages = given[line - 1]["messages"]
        messages = messages[:-1] if messages[-1]["role"] == "user" else messages
        assert row["prompt"] + row["chosen"] == messages
    origin = rows[0]["provenance"]
    assert origin["chosen"] == {"kind": "data", "is_cut": False} and origin["seed"] == 5
    assert origin["rejected"]["model"] == str(tuned) and origin["rejected"]["step"] == read_run(tuned).step
    assert origin["rejected"]["max_tokens"] == 24 and len(origin["rejected"]["fingerprint"]) == 16
    assert len({row["rejected"][0]["content"] for row in rows}) > kept / 2


def test_what_is_made_is_what_dpo_reads(made, tuned, tmp_path):
    path, _ = made
    rows = read(path)
    pairs = read_pairs(path)
    assert len(pairs.pairs) == len(rows) == pairs.rows
    for pair, row in zip(pairs.pairs, rows, strict=True):
        assert [{"role": role, "content": content} for role, content, _ in pair.prompt] == row["prompt"]
        assert [pair.chosen, pair.rejected] == [row[side][0]["content"] for side in ("chosen", "rejected")]
    assert ["system", "user", "assistant", "user"] in [[message.role for message in pair.prompt] for pair in
                                                      pairs.pairs]
    printed = call("dpo", "quickstart/dpo", f"init={tuned}", f"data={path}", f"run.dir={tmp_path / 'run'}",
                   "batch.tokens=1024", "batch.sequence_length=128", "optimizer.lr=1e-3", "sample.every=0", "steps=4",
                   "log.every=1", "log.report=false")
    assert printed.status == 0, printed.err
    losses = [record["loss"] for record in read_run(tmp_path / "run").train]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0]


def test_the_same_command_has_nothing_left_to_do(made, command):
    path, _ = made
    before = path.read_bytes(), path.with_name("pairs.jsonl.state").read_bytes()
    printed = call(*command, f"output={path}")
    assert printed.status == 0 and "0 of them new" in printed.out
    assert (path.read_bytes(), path.with_name("pairs.jsonl.state").read_bytes()) == before


def test_draws_depend_on_seed_and_prompt_alone(made, command, tmp_path):
    """Batches of one row: the same bits; some of the prompts: the same rows; another seed: others."""
    path, _ = made
    by_one = [*command, "rejected.batch_tokens=1"]
    assert call(*by_one, f"output={tmp_path / 'one.jsonl'}").status == 0
    assert (tmp_path / "one.jsonl").read_bytes() == path.read_bytes()
    printed = call(*by_one, f"output={tmp_path / 'some.jsonl'}", "limit=9")
    assert printed.status == 0 and in_table(printed)["beyond limit"] == 39
    assert 0 < len(read(tmp_path / "some.jsonl")) <= 9
    assert set((tmp_path / "some.jsonl").read_text().splitlines()) < set(path.read_text().splitlines())
    assert call(*by_one, f"output={tmp_path / 'other.jsonl'}", "seed=6").status == 0
    ours, others = ({row["provenance"]["key"]: row["rejected"] for row in read(each)} for each in (
        path, tmp_path / "other.jsonl"))
    assert sum(ours[key] != others[key] for key in ours.keys() & others.keys()) > 35


@pytest.mark.parametrize("share", [0.1, 0.5, 0.93])
def test_torn_anywhere_it_goes_on_to_the_same_bytes(made, command, tmp_path, share):
    path, _ = made
    part = tmp_path / "part.jsonl"
    part.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])
    part.with_name("part.jsonl.state").write_bytes(path.with_name("pairs.jsonl.state").read_bytes())
    printed = call(*command, f"output={part}", "rejected.batch_tokens=200")
    assert printed.status == 0 and part.read_bytes() == path.read_bytes()


def test_killed_it_goes_on_to_the_same_bytes(made, command, tmp_path):
    path, _ = made
    output = tmp_path / "killed.jsonl"
    process = start(*command, f"output={output}", "rejected.batch_tokens=200")
    until = time.monotonic() + 120
    while not (output.exists() and output.stat().st_size) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    killed = process.wait_for_text()
    there = output.stat().st_size
    assert 0 < there, killed.stdout
    printed = call(*command, f"output={output}", "rejected.batch_tokens=200")
    assert printed.status == 0 and output.read_bytes() == path.read_bytes()
    assert there < path.stat().st_size or killed.returncode == 0


@pytest.mark.parametrize(("overrides", "message"), [
    (["rejected.temperature=0.5"], "rejected.temperature: 1.0 in the file, 0.5 now"),
    (["seed=6"], "seed: 5 in the file, 6 now"), (["cut_answers=keep"], 'cut_answers: "drop_chosen" in the file')])
def test_a_changed_setting_is_refused_on_the_same_output(made, command, overrides, message):
    path, _ = made
    before = path.read_bytes()
    printed = call(*command, f"output={path}", *overrides)
    assert printed.status == 2 and message in printed.err and "give another output" in printed.err
    assert path.read_bytes() == before


def test_another_checkpoint_is_refused_on_the_same_output(made, command, tuned):
    path, _ = made
    printed = call(*command, f"output={path}", f"rejected={tuned}@{read_run(tuned).step - 1}")
    assert printed.status == 2 and "rejected.fingerprint: " in printed.err and "rejected.step: " in printed.err


def endpoint(side, server, **options):
    given = {"base_url": server.base_url, "model": "m", "api_key_env": "TEST_API_KEY", **options}
    return [f"{side}.{name}={value}" for name, value in given.items()]


def last(asked):
    return asked.body["messages"][-1]["content"]


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("TEST_API_KEY", KEY)


def test_an_endpoint_beside_our_model(command, dialogues, tmp_path, key):
    """The better answers of an endpoint, among them one that is cut and one that is empty."""
    def script(asked, number):
        finish = "length" if last(asked) == "天气" else "stop"
        return Say(body=completion("" if last(asked) == "公园" else f"好：{last(asked)}", finish=finish))

    with ChatServer(script) as server:
        printed = call(*command, f"output={tmp_path / 'pairs.jsonl'}", *endpoint("chosen", server))
    assert printed.status == 0, printed.err
    rows = read(tmp_path / "pairs.jsonl")
    assert all(row["chosen"][0]["content"] == f"好：{row['prompt'][-1]['content']}" for row in rows)
    assert rows[0]["provenance"]["chosen"]["model"] == "served-model"
    assert rows[0]["provenance"]["chosen"]["base_url"] == server.base_url
    table = in_table(printed)
    assert table["an answer cut by max_tokens"] == 1 and table["an empty answer"] >= 1
    # The open question is a prompt here, and the copy of a row is none.
    assert len(server.asked) == 49 - table["prompt leaves no room"]
    assert all(KEY not in path.read_text() for path in tmp_path.iterdir()) and KEY not in printed.out + printed.err


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {index}"}) + "\n" for index in range(40)))
    return path


def test_two_endpoints_and_what_fails_is_asked_again(questions, tmp_path, key):
    broken = [True]

    def worse(asked, number):
        if broken and last(asked) in ("question 3", "question 17"):
            return Say(status=400, body={"error": {"message": "[red]filtered[/]"}})
        return "same" if last(asked) == "question 5" else f"worse {last(asked)}"

    def better(asked, number):
        return "  same\n" if last(asked) == "question 5" else f"better {last(asked)}"

    with ChatServer(better) as one, ChatServer(worse) as other:
        command = ["pairs", f"data={questions}", f"output={tmp_path / 'pairs.jsonl'}", *endpoint("chosen", one),
                   *endpoint("rejected", other, send_seed="true")]
        first = call(*command)
        assert first.status == 0 and in_table(first)["failed"] == 2 and in_table(first)["equal answers"] == 1
        assert "2 prompts have no answer yet; the same command asks again" in first.out
        assert [line for line in sources(tmp_path / "pairs.jsonl")] == [
            line for line in range(1, 41) if line not in (4, 6, 18)]
        before = len(one.asked), len(other.asked)
        broken.clear()
        again = call(*command)
        assert (len(one.asked) - before[0], len(other.asked) - before[1]) == (2, 2)
    assert again.status == 0 and "2 of them new" in again.out and "failed" not in in_table(again)
    assert sorted(sources(tmp_path / "pairs.jsonl")) == [line for line in range(1, 41) if line != 6]
    assert len({asked.body["seed"] for asked in other.asked}) == 40 and "seed" not in one.asked[0].body


def test_killed_again_and_again_each_prompt_is_there_once(questions, tmp_path):
    """The process of a slow endpoint, killed in the middle three times."""
    output = tmp_path / "pairs.jsonl"
    with ChatServer(lambda asked, number: Say(f"worse {last(asked)}", delay=0.05)) as server:
        with ChatServer(lambda asked, number: f"better {last(asked)}") as good:
            words = ["pairs", f"data={questions}", f"output={output}", f"chosen.base_url={good.base_url}",
                     "chosen.model=m", f"rejected.base_url={server.base_url}", "rejected.model=m",
                     "rejected.concurrency=2"]
            size = 0
            for _ in range(3):
                process = start(*words)
                until = time.monotonic() + 60
                while time.monotonic() < until and process.poll() is None:
                    if output.exists() and output.stat().st_size > size:
                        break
                    time.sleep(0.002)
                process.send_signal(signal.SIGKILL)
                killed = process.wait_for_text()
                assert killed.returncode == -signal.SIGKILL, killed.stdout
                size = output.stat().st_size
            assert 0 < len(output.read_text().splitlines()) < 40
            assert call(*words).status == 0
    assert sources(output) == list(range(1, 41))


def test_a_server_that_goes_away_stops_the_command_and_keeps_what_is_there(questions, tmp_path):
    output = tmp_path / "pairs.jsonl"
    with ChatServer() as good, ChatServer(lambda asked, number: "ok" if number < 10 else Say(status=400)) as server:
        printed = call("pairs", f"data={questions}", f"output={output}", f"chosen.base_url={good.base_url}",
                       "chosen.model=m", f"rejected.base_url={server.base_url}", "rejected.model=m",
                       "rejected.max_failures=5", "rejected.concurrency=1")
    assert printed.status == 2 and "5 requests in a row have failed" in printed.err
    assert sources(output) == list(range(1, 11))


def test_a_plan_asks_nothing_and_writes_nothing(questions, tmp_path):
    with ChatServer() as server:
        printed = call("pairs", f"data={questions}", f"output={tmp_path / 'pairs.jsonl'}", "--dry-run",
                       f"chosen.base_url={server.base_url}", "chosen.model=m", f"rejected.base_url={server.base_url}",
                       "rejected.model=n")
    assert printed.status == 0 and "40 prompts" in printed.out and "nothing was started" in printed.out
    assert not server.asked and list(tmp_path.iterdir()) == [questions]


@pytest.mark.parametrize(("overrides", "message"), [
    (["rejected=nowhere"], "no model nowhere"), (["data=missing.jsonl"], "data.path=missing.jsonl does not exist"),
    (["output=pairs.json"], "must be a file of this machine that ends in .jsonl"),
    (["output=gs://bucket/pairs.jsonl"], "must be a file of this machine"),
    (["rejected.max_token=3"], "rejected.max_tokens?"),
    (["rejected.retries=3"], "retries is only read with base_url"),
    (["rejected.temperature=null"], "may only be null with base_url"),
    (["rejected.base_url=http://localhost/v1", "rejected.top_k=3"], "body={top_k"),
    (["rejected.base_url=localhost"], "must begin with http://"),
    (["chosen.model=m"], "chosen.base_url: must be given"),
    (["chosen.base_url=http://localhost/v1", "chosen.model=m", "chosen.api_key_env=NO_SUCH_KEY"],
     "api_key_env=NO_SUCH_KEY: there is no such environment variable"),
])
def test_what_does_not_fit_is_said_in_a_line(command, overrides, message, tmp_path):
    printed = call(*command, f"output={tmp_path / 'pairs.jsonl'}", *overrides)
    assert printed.status == 2 and message in printed.err and "Traceback" not in printed.err
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_not_taught_is_refused(command, text_run, tmp_path):
    printed = call(*command, f"output={tmp_path / 'pairs.jsonl'}", f"rejected={text_run.directory}")
    assert printed.status == 2 and "was not taught to answer" in printed.err


def test_no_prompt_that_fits_is_said(command, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": LONG, "completion": "好"}))
    printed = call(*command, f"data={path}", f"output={tmp_path / 'pairs.jsonl'}")
    assert printed.status == 2 and "no prompt is left" in printed.err and "prompt leaves no room" in printed.out
