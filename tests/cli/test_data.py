"""`data`, `prepare` and `tokenizer` as a user types them."""

import json
import random

import pytest

from ctllm_jax.cli import main

WORDS = ["今天", "天气", "不错", "我们", "去", "公园", "散步", "。", "，", "the", " model", " reads", " text", "\n"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with text, a tokenizer and a dataset, made by the commands."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    texts = [f"{index}: " + "".join(draw.choices(WORDS, k=60)) for index in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[0]]))
    assert main(["tokenizer", f"input={folder}/text.jsonl", f"output={folder}/t.model", "vocab_size=330",
                 "character_coverage=1.0"]) == 0
    assert main(["prepare", f"input={folder}/text.jsonl", f"tokenizer={folder}/t.model", f"output={folder}/out",
                 "record_tokens=64", "validation_fraction=0.1"]) == 0
    return folder


def test_tokenizer_tells_bytes_a_token(corpus, tmp_path, capsys):
    assert main(["tokenizer", f"input={corpus}/text.jsonl", f"output={tmp_path}/t.model", "vocab_size=330",
                 "character_coverage=1.0"]) == 0
    printed = capsys.readouterr().out
    assert "330 pieces" in printed
    row = next(line for line in printed.splitlines() if line.strip().startswith("Chinese"))
    assert 1 < float(row.split()[-1]) < 12


def test_prepare_tells_what_became_of_the_documents(corpus, tmp_path, capsys):
    assert main(["prepare", f"input={corpus}/text.jsonl", f"tokenizer={corpus}/t.model", f"output={tmp_path}/out"]) == 0
    printed = capsys.readouterr().out
    stages = {row[1]: row[2:6] for row in (line.split() for line in printed.splitlines()) if row[:1] == ["text"]}
    assert stages["read"] == ["61", "61", "0", "0"] and stages["exact"] == ["61", "60", "1", "0"]
    assert f"next: python launch.py data inspect {tmp_path}/out" in printed
    assert (tmp_path / "out/report.html").exists()
    assert any("validation" in line.split() for line in printed.splitlines())


def test_prepare_names_its_rules_and_what_was_set_aside(corpus, tmp_path, capsys):
    """The next command can be pasted into a shell, where a space ends a word."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert main(["prepare", f"input={tmp_path}/a.jsonl", f"output={tmp_path}/the output", "rules=light",
                 "max_bad=1"]) == 0
    printed = capsys.readouterr().out.replace("\n", "")
    assert f"rules: light; report: {tmp_path}/the output/report.html; 1 record set aside: {tmp_path}/the output/" \
        "quarantine.jsonl" in printed
    assert f"next: python launch.py tokenizer 'input={tmp_path}/the output/clean' output=tokenizer.model" in printed


def test_a_dry_run_writes_nothing(corpus, tmp_path, capsys):
    assert main(["prepare", f"input={corpus}/text.jsonl", f"tokenizer={corpus}/t.model", f"output={tmp_path}/out",
                 "--dry-run"]) == 0
    assert main(["tokenizer", f"input={corpus}/text.jsonl", f"output={tmp_path}/t.model", "vocab_size=330",
                 "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert "text.jsonl: jsonl, utf-8, text field text" in capsys.readouterr().out


def test_a_bad_line_is_status_2_and_named(corpus, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert main(["prepare", f"input={tmp_path}/a.jsonl", f"tokenizer={corpus}/t.model", f"output={tmp_path}/out"]) == 2
    assert f"{tmp_path}/a.jsonl:2: malformed JSON" in capsys.readouterr().err


def test_verify_passes_then_names_the_shard(corpus, tmp_path, capsys):
    assert main(["data", "verify", f"{corpus}/out"]) == 0
    assert capsys.readouterr().out.startswith("good ")
    assert main(["prepare", f"input={corpus}/text.jsonl", f"tokenizer={corpus}/t.model", f"output={tmp_path}/out"]) == 0
    shard = next((tmp_path / "out/text").glob("*train*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    capsys.readouterr()
    assert main(["data", "verify", f"{tmp_path}/out", f"{corpus}/out"]) == 1
    printed = capsys.readouterr().out
    assert f"{shard}: truncated" in printed and "good " in printed
    assert main(["data", "verify", str(tmp_path)]) == 1


def test_inspect_shows_rows_as_the_model_sees_them(corpus, capsys):
    assert main(["data", "inspect", f"{corpus}/out", "rows=1"]) == 0
    printed = capsys.readouterr().out
    assert "rows of 64 tokens" in printed
    assert "row 0: 2 segments, 64 tokens, 63 with loss" in printed
    assert "⟨end⟩" in printed and "今天" in printed
    assert main(["data", "inspect", f"{corpus}/out", "rows=1", "isolate_documents=false", "mask_eod=false"]) == 0
    assert "row 0: 1 segment, 64 tokens, 64 with loss" in capsys.readouterr().out


def test_inspect_shows_ids(corpus, capsys):
    assert main(["data", "inspect", f"{corpus}/out", "rows=1", "ids=true", "show_tokens=5"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] and
            line.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row[1] for row in rows[1:]] == [row[3] for row in rows[:-1]]


def test_inspect_of_text_needs_a_tokenizer(corpus, capsys):
    assert main(["data", "inspect", f"{corpus}/text.jsonl"]) == 2
    assert "tokenizer must be given" in capsys.readouterr().err
    assert main(["data", "inspect", f"{corpus}/text.jsonl", f"tokenizer={corpus}/t.model", "start=1",
                 "sequence_length=32"]) == 0
    assert "row 1: " in capsys.readouterr().out


def test_text_cannot_steer_the_terminal(corpus, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\x1b[31mred\x07 [bold]not markup[/bold]\x9b")
    assert main(["data", "inspect", f"{tmp_path}/a.txt", f"tokenizer={corpus}/t.model"]) == 0
    printed = capsys.readouterr().out
    assert "␛[31mred␇ [bold]not markup[/bold]\ufffd" in printed
    assert "\x1b" not in printed and "\x9b" not in printed


@pytest.mark.parametrize("words, message", [
    (["data"], "data needs an action"),
    (["data", "inspect"], "needs a dataset directory, or a file of text, dialogues or pairs"),
    (["data", "verify"], "needs a dataset directory"),
    (["data", "inspect", "nowhere", "tokenizer=t.model"], "t.model does not exist")])
def test_what_is_missing_is_told(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_an_estimate_times_a_sample_and_writes_nothing(corpus, tmp_path, capsys):
    assert main(["prepare", f"input={corpus}/text.jsonl", f"tokenizer={corpus}/t.model", f"output={tmp_path}/out",
                 "--estimate"]) == 0
    printed = capsys.readouterr().out
    assert "with" in printed and "of disk" in printed and "kept: about 60 documents" in printed
    assert {"read", "filter", "pack"} <= {line.split()[0] for line in printed.splitlines() if line.split()}
    assert list(tmp_path.iterdir()) == []


def test_explain_shows_each_rule(tmp_path, capsys):
    (tmp_path / "page.txt").write_text("今天天气不错，我们去公园玩。明天再说！")
    assert main(["prepare", f"explain={tmp_path}/page.txt", "rules=web"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}
    assert "dropped" in rows["length"] and "19" in rows["length"] and "≥ 50" in rows["length"]
    assert "kept" in rows["digit_fraction"] and "S7" in rows["digit_fraction"]
    assert main(["prepare", f"explain={tmp_path}/none.txt"]) == 2
    assert "none.txt: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (["output=out"], "give input, for a single source, or sources"),
    (["input=a", "sources.b.input=b", "output=out"], "input and sources exclude each other"),
    (["input=a"], "output is missing"),
    (["sources.clean.input=b", "output=out"], "is not stages or clean"),
    (["input=a", "output=out", "rules=wob"], "web"),
    (["input=a", "output=out", "minhash.bands=20"], "bands=20 × rows=13 are 260 hashes"),
    (["input=nowhere", "output=out"], "nowhere"),
    (["input=a", "output=out", "--estimat"], "unknown option --estimat"),
])
def test_what_is_wrong_is_said_before_anything_is_read(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", *arguments]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
