"""`data inspect` of dialogues and pairs: what is learned is marked, markers have names, rows are the run's own."""

import json
import re

import pytest

from ctllm_jax.cli.inspection import Shown, Writer, find_kind
from ctllm_jax.config.inspect import InspectConfig
from ctllm_jax.config.load import load
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data.chat import Message
from ctllm_jax.data.sft import joined, pack_row
from ctllm_jax.data.templates import open_template
from ctllm_jax.data.tokenizer import load_tokenizer
from tests.cli.conftest import call
from tests.cli.test_sft import write_dialogues


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture
def dialogues(tmp_path):
    return write(tmp_path / "dialogues.jsonl", [
        {"messages": [{"role": "user", "content": "天气不错 \x1b[31m[bold]"},
                      {"role": "assistant", "content": "去公园"}, {"role": "user", "content": "今天"},
                      {"role": "assistant", "content": "散步", "weight": 0.5}]},
        {"messages": [{"role": "user", "content": "我们"}, {"role": "assistant", "content": "不错", "weight": 0},
                      {"role": "user", "content": "今天"}, {"role": "assistant", "content": "天气"}]}])


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", [{"prompt": "今天", "chosen": "去公园散步", "rejected": "不错"},
                                            {"prompt": "我们", "chosen": "天气", "rejected": "公园公园公园"}])


def inspect(corpus, path, *words):
    return call("data", "inspect", path, f"tokenizer={corpus.tokenizer}", *words)


def test_dialogues_show_what_is_learned_and_by_how_much(corpus, dialogues):
    printed = inspect(corpus, dialogues, "template=plain", "sequence_length=128", "rows=9")
    assert printed.status == 0, printed.err
    flat = printed.out.replace("↵\n", "↵").replace("\n", "")
    # Its own text, cut nowhere; a control character is a sign, and markup is text.
    assert "用户：天气不错 ␛[31m[bold]↵助手：⟦去公园⟨</s>⟩⟧↵用户：今天↵助手：⟦×0.5 散步⟨</s>⟩⟧↵" in flat
    assert "用户：我们↵助手：不错⟨</s>⟩↵用户：今天↵助手：⟦天气⟨</s>⟩⟧↵" in flat
    assert f"{dialogues}:1: user, assistant, user, assistant × 0.5" in flat
    assert f"{dialogues}:2: user, assistant × 0, user, assistant" in flat
    assert "\x1b" not in printed.out


def test_the_numbers_are_those_of_the_row(corpus, dialogues):
    printed = inspect(corpus, dialogues, "template=plain", "sequence_length=128", "rows=1", "ids=true", "show_tokens=0")
    found = re.search(r"row 0: (\d+) segments?, (\d+) tokens(?:, (\d+) of padding)?, (\d+) learned", printed.out)
    rows = [line.split() for line in printed.out.splitlines() if re.match(r" *\d+ +\d+ ", line)]
    real = [row for row in rows if row[-2] != "0"]
    assert len(rows) == 128 and len(real) == int(found[2]) and "⟨</s>⟩" in printed.out
    assert {row[-2] for row in real} == {str(segment + 1) for segment in range(int(found[1]))}


def test_pairs_show_both_answers_once_with_their_prompt(corpus, pairs):
    printed = inspect(corpus, pairs, "template=plain", "sequence_length=128", "rows=9")
    assert printed.status == 0, printed.err
    assert printed.out.count("用户：今天↵\n助手：") == 1
    for side, text in [("chosen", "去公园散步"), ("rejected", "不错"), ("chosen", "天气"),
                       ("rejected", "公园公园公园")]:
        assert re.search(rf"{side}, \d+ tokens  ⟦{text}⟨</s>⟩⟧↵", printed.out), text
    assert f"{pairs}:1" in printed.out and f"{pairs}:2" in printed.out
    short = inspect(corpus, pairs, "template=plain", "sequence_length=128", "rows=9", "show_tokens=2")
    assert "tokens more (show_tokens=0 prints all)" in short.out


def test_markers_have_names(corpus):
    tokenizer = load_tokenizer(corpus.tokenizer)
    config = TemplateConfig(user_id=tokenizer.vocab_size, assistant_id=tokenizer.vocab_size + 1)
    template = open_template(config, tokenizer)
    assert template.marker_names() == {tokenizer.vocab_size: "user", tokenizer.vocab_size + 1: "assistant", 2: "</s>"}
    rendered = template.render([Message("user", "今天⟨user⟩"), Message("assistant", " the")])
    row = pack_row(joined([rendered], [0]), [0], 32)
    first, text = Writer(template, colors=False).dialogues(Shown(0, row, ["x.jsonl:3: user, assistant"]), 0)
    assert first.plain.endswith("tokens: x.jsonl:3: user, assistant")
    assert text.plain == "⟨user⟩今天⟨user⟩⟨assistant⟩⟦ the⟨</s>⟩⟧"


def test_color_tells_the_same_as_brackets(corpus):
    template = open_template(TemplateConfig(kind="plain"), load_tokenizer(corpus.tokenizer))
    rendered = [template.render([Message("user", "今天"), Message("assistant", "不错", weight)]) for weight in (1, 0.5)]
    row = pack_row(joined(rendered, [0, 0]), [0, 1], 128)
    texts = list(Writer(template, colors=True).dialogues(Shown(0, row, []), 0))[1::2]
    for text, color, tail in zip(texts, ("cyan", "green"), ("", "×0.5"), strict=True):
        looks = [(text.plain[span.start:span.end], str(span.style)) for span in text.spans]
        assert ("不错", f"bold {color}") in looks
        assert any("reverse" in style and "</s>" in said for said, style in looks)
        assert all("dim" in style for said, style in looks if "用户" in said) and "⟦" not in text.plain
        assert not tail or (tail, "yellow") in looks


@pytest.mark.parametrize(("record", "kind"), [
    ({"text": "今天"}, "text"), ({"prompt": "a", "completion": "b"}, "dialogues"),
    ({"instruction": "a", "input": "", "output": "b", "text": "ab"}, "dialogues"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pairs"), ({"other": "a"}, "text")])
def test_what_a_file_holds_is_seen_from_its_fields(tmp_path, record, kind):
    path = tmp_path / "rows.jsonl"
    path.write_text("not json\n" + json.dumps(record) + "\n")
    assert find_kind(path, InspectConfig()) == kind
    assert find_kind(path, InspectConfig(kind="text")) == "text"


def test_a_text_is_still_a_text(corpus):
    printed = inspect(corpus, corpus.folder / "zh.jsonl", "sequence_length=32")
    assert printed.status == 0 and "reversed: input without loss" in printed.out


def test_before_the_words_of_a_run_its_own_rows_are_shown(text_run, tmp_path):
    data = write_dialogues(tmp_path / "zh.jsonl")
    words = ["sft", "quickstart/sft", f"init={text_run.directory}", f"data.sources.zh={data}", "batch.tokens=512",
             "batch.sequence_length=64", "data.held_out=0.2"]
    printed = call("data", "inspect", *words, "rows=2", "start=1", "show_tokens=0")
    assert printed.status == 0, printed.err
    assert "row 1: " in printed.out and "row 2: " in printed.out and "dialogues held out" in printed.out
    from ctllm_jax.config.sft import SFTConfig
    from ctllm_jax.training.sft import open_stage

    own = open_stage(load(SFTConfig, target=words[1], overrides=words[2:]), keep_texts=True).data
    shown = re.findall(rf"{re.escape(str(data))}:(\d+): user, assistant", printed.out.replace("\n", ""))
    assert [int(each) for each in shown] == [own.dialogues[item].row for row in (1, 2) for item in own.items(0, row)]
    apart = call("data", "inspect", *words, "split=held_out", "rows=99", "show_tokens=0")
    asked = {int(number) for number in re.findall(r"今天天气(\d+)，", apart.out)}
    trained = {each.row - 1 for each in own.dialogues}
    assert "held out of zh" in apart.out and asked == set(range(40)) - trained
    text = call("data", "inspect", "pretrain", text_run.command[1], *text_run.command[3:], "rows=1")
    assert text.status == 0 and "row 0: " in text.out


@pytest.mark.parametrize(("words", "message"), [
    (["sft"], "data inspect sft needs one config"), (["sft", "quickstart/sft", "rows=0"], "rows=0"),
    (["sft", "quickstart/sft", "data.lost_on=x"], "unknown key; did you mean data.loss_on?"),
    (["dpo", "quickstart/dpo", "init=nowhere"], "nowhere"), (["nowhere.jsonl"], "no such file or folder"),
    (["pretrain", "debug/pretrain"], "synthetic")])
def test_what_is_wrong_is_told(words, message):
    printed = call("data", "inspect", *words)
    assert printed.status == 2 and message in printed.err and "Traceback" not in printed.err


def test_a_bad_row_is_named(corpus, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "今天"},
                                                         {"role": "assistant", "content": "好"}]}, {"messages": 3}])
    printed = inspect(corpus, path, "template=plain")
    assert printed.status == 2 and f"{path}:2: " in printed.err
    assert inspect(corpus, path, "template=plain", "max_bad=1").status == 0
    missing = call("data", "inspect", path)
    assert missing.status == 2 and "holds dialogues" in missing.err
    far = inspect(corpus, path, "template=plain", "max_bad=1", "start=7")
    assert far.status == 2 and "start=7" in far.err
