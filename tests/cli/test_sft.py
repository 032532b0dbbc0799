"""`sft` and `chat` as a user types them: from a run on text to answers."""

import io
import json
from pathlib import Path

import pytest

from ctllm_jax.report.run import read_run
from ctllm_jax.training.checkpoints.checkpoint import list_checkpoints
from data_prep.train_tokenizer import fit
from tests.cli.conftest import call
from tests.small_text import VOCABULARY

ANSWERS = ["今天天气不错。", "我们去公园散步。", "去公园。", "不错。"]


def write_dialogues(path, count=40):
    """So many dialogues of a question and an answer, in messages layout."""
    rows = [{"messages": [{"role": "user", "content": f"今天天气{index}，"},
                          {"role": "assistant", "content": ANSWERS[index % 4]}]} for index in range(count)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def write_other_tokenizer(path):
    """A tokenizer of as many ids as the corpus's, for other text."""
    lines = [f"{index} " + "".join(chr(0x4e00 + (7 * index + place) % 40) for place in range(9)) for index in range(90)]
    path.write_bytes(fit(lines, vocab_size=VOCABULARY, character_coverage=1.0))


@pytest.fixture(scope="module")
def command(text_run, tmp_path_factory):
    """A tuning of two epochs from the run on text."""
    folder = tmp_path_factory.mktemp("sft")
    data = write_dialogues(folder / "zh.jsonl")
    return ["sft", "quickstart/sft", f"init={text_run.directory}", f"data.sources.zh={data}",
            f"run.dir={folder / 'run'}", "batch.tokens=512", "batch.sequence_length=64", "data.epochs=2",
            "data.held_out=0.2", "optimizer.lr=1e-3", "evaluation.every=2", "evaluation.rows_per_device=2",
            "sample.every=2", "sample.max_tokens=6", "log.every=1", "checkpoint.every=1"]


@pytest.fixture(scope="module")
def tuned(command):
    """(its directory, what the command printed)."""
    printed = call(*command)
    assert printed.status == 0, printed.err
    return command[4].partition("=")[2], printed


def test_a_run_on_dialogues_says_what_it_learned_from(tuned):
    directory, printed = tuned
    run = read_run(directory)
    assert run.state == "done" and run.evaluation[-1]["sources"]["zh"]["loss"] > 0
    assert "from the weights of" in printed.out and "steps an epoch" in printed.out
    assert f"next: python launch.py chat {directory}" in printed.out
    assert {sample["prompt"] for sample in run.sample} == set(run.config["sample"]["prompts"])
    losses = [record["loss"] for record in run.train]
    assert len(losses) >= 2 and losses[-1] < losses[0]


def test_tokens_are_counted_without_the_padding(tuned):
    directory, printed = tuned
    run = read_run(directory)
    # Every epoch has the tokens of all dialogues that are trained on, which the data's own report counts.
    whole = 2 * run.start["data"]["sources"]["zh"]["tokens"]
    room = 512 * run.start["steps"]
    assert run.train[-1]["tokens"] == run.evaluation[-1]["tokens"] == run.sample[-1]["tokens"] == whole < 0.99 * room
    assert list_checkpoints(Path(directory))[-1].meta["tokens"] == whole
    assert f"{whole:,} tokens and {room - whole:,} of padding" in printed.out
    before = 0
    for record in run.train:  # one for each step
        assert record["tokens_per_second"] * record["step_seconds"] == pytest.approx(record["tokens"] - before)
        assert record["padded_tokens_per_second"] * record["step_seconds"] == pytest.approx(512)
        before = record["tokens"]


def test_the_template_goes_into_the_checkpoint(tuned):
    directory, _ = tuned
    meta = list_checkpoints(Path(directory))[-1].meta
    assert meta["template"]["config"]["kind"] == "plain" and len(meta["template"]["fingerprint"]) >= 16


def test_the_same_command_has_nothing_left_to_do(tuned, command):
    again = call(*command)
    assert again.status == 0 and "resuming" in again.out


def test_another_template_is_refused(tuned, command, tmp_path):
    directory, _ = tuned
    printed = call(*[word for word in command if not word.startswith(("init=", "run.dir="))], f"init={directory}",
                   f"run.dir={tmp_path / 'run'}", "data.template.plain_user={content}→")
    assert printed.status == 2 and "a model keeps the one it has learned" in printed.err


@pytest.mark.parametrize(("overrides", "message"), [
    (["init=nowhere"], "nowhere"),
    (["data.sources.zh=missing.jsonl"], "missing.jsonl"),
    (["batch.sequence_length=1024", "batch.tokens=1024"], "above model.context_length"),
    (["data.ratio=zh:en=2:1"], "which no source has"),
    (["data.template=baichuan"], "baichuan2"),
    (["data.tokenizer={other}"], "ids differ between"),
    (["data.tokenizer={other}", "--dry-run"], "ids differ between"),
    (["model={vocab_size: 330, hidden_size: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, ffn_size: 96,"
      " head_dim: 8, norm_eps: 1.0e-6}"], "model.norm_eps: 1e-05 there, 1e-06 here"),
])
def test_what_does_not_fit_is_said_in_a_line(command, overrides, message, tmp_path):
    write_other_tokenizer(tmp_path / "other.model")
    overrides = [word.replace("{other}", str(tmp_path / "other.model")) for word in overrides]
    printed = call(*command, f"run.dir={tmp_path / 'run'}", *overrides)
    assert printed.status == 2 and message in printed.err and "Traceback" not in printed.err


def test_a_plan_starts_nothing(command, tmp_path):
    printed = call(*command, f"run.dir={tmp_path / 'run'}", "--dry-run")
    assert printed.status == 0 and "nothing was started" in printed.out and not list(tmp_path.iterdir())


def chat(monkeypatch, lines, *words):
    """The command with these lines on its standard input."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return call("chat", *words)


def test_questions_from_a_pipe_are_answered(tuned, monkeypatch):
    directory, _ = tuned
    first = chat(monkeypatch, ["今天天气1，", "/reset", "/what", "今天天气1，"], directory, "temperature=0",
                 "max_tokens=8")
    assert first.status == 0, first.err
    lines = first.out.splitlines()
    places = [index for index, line in enumerate(lines) if line == "> 今天天气1，"]
    # Forgotten, the same question has the same answer; remembered, the dialogue before it is part of the prompt.
    assert lines[places[0] + 1] == lines[places[1] + 1]
    assert "forgotten" in lines and "there are /reset, /system TEXT and /exit" in lines


def test_a_line_that_is_not_utf8_is_left_out_and_the_next_is_answered(tuned, monkeypatch):
    directory, _ = tuned
    lines = b"/system \xff\n\xe4\xbb\n" + "今天天气1，\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    printed = call("chat", directory, "temperature=0", "max_tokens=4")
    assert printed.status == 0 and printed.out.count("this line is not UTF-8, and is left out") == 2, printed.err
    assert "> 今天天气1，\n" in printed.out and "Traceback" not in printed.err


@pytest.mark.parametrize(("overrides", "message"), [
    (["template=chatml"], "kind: 'plain' there, 'chatml' here"),
    (["template.kind=baichuan2"], "kind: 'plain' there, 'baichuan2' here"),
    (["template.kind=plain", "template.system=好"], "system: None there, '好' here"),
    (["template=baichuan"], "baichuan2"),
])
def test_a_chat_through_another_template_is_refused(tuned, monkeypatch, overrides, message):
    directory, _ = tuned
    printed = chat(monkeypatch, ["今天"], directory, *overrides)
    assert printed.status == 2 and message in printed.err and "Traceback" not in printed.err
    if message != "baichuan2":
        assert f"{directory} was tuned with another template than template=" in printed.err
        assert "a model keeps the one it has learned" in printed.err


def test_the_template_that_was_learned_may_be_named(tuned, monkeypatch):
    directory, _ = tuned
    words = (directory, "temperature=0", "max_tokens=4")
    assert chat(monkeypatch, ["今天"], *words, "template=plain").out == chat(monkeypatch, ["今天"], *words).out


def test_a_model_that_was_not_taught_needs_a_template(text_run, monkeypatch):
    printed = call("chat", text_run.directory)
    assert printed.status == 2 and "was not taught to answer" in printed.err
    printed = chat(monkeypatch, ["今天"], text_run.directory, "template=plain", "max_tokens=4")
    assert printed.status == 0 and "> 今天" in printed.out
    printed = chat(monkeypatch, ["今天"], text_run.directory, "template=plain", "template.end_id=400")
    assert printed.status == 2 and "has the id 400, and" in printed.err
