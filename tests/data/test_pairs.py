"""Pairs are read from the layouts in use; what cannot be learned from is counted, what cannot be read is named."""

import json
from pathlib import Path

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.data.chat import Message
from ctllm_jax.data.pairs import detect_layout, read_pairs

ALIGNMENT = Path(__file__).resolve().parents[3] / "shared" / "data" / "alignment"
USER, BETTER, WORSE = {"role": "user", "content": "问"}, {"role": "assistant", "content": "好"}, {
    "role": "assistant", "content": "坏"}
BOTH = {"chosen": "好", "rejected": "坏"}
ROWS = {
    "trl": [{"prompt": "问", **BOTH}, {"question": "问", **BOTH}, {"instruction": "问", **BOTH},
            {"prompt": [USER], "chosen": [BETTER], "rejected": [WORSE]},
            {"chosen": [USER, BETTER], "rejected": [USER, WORSE]},
            {"prompt": "问", "chosen": [USER, BETTER], "rejected": [USER, WORSE]},
            {"prompt": "问", "chosen": [BETTER], "rejected": [WORSE]},
            {"chosen": "问好", "rejected": "问坏"}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "问"}], "chosen": {"from": "gpt", "value": "好"},
                  "rejected": {"from": "gpt", "value": "坏"}},
                 {"conversations": [{"from": "human", "value": "问"}], **BOTH},
                 {"conversations": [USER], "chosen": BETTER, "rejected": WORSE}],
    "alpaca": [{"instruction": "问", "input": "", "output": ["好", "坏"]},
               {"instruction": "问", "output": ["好", "坏", "更坏"], "history": []}],
    "ultrafeedback": [{"instruction": "问", "completions": [
        {"response": "中", "overall_score": 5}, {"response": "好", "overall_score": 8.5},
        {"response": "坏", "overall_score": 2.0}]},
        {"instruction": "问", "completions": [{"response": "坏", "fine-grained_score": 1.25},
                                             {"response": "好", "fine-grained_score": 4.0}]}],
    "hh": [{"chosen": "\n\nHuman: 问\n\nAssistant: 好", "rejected": "\n\nHuman: 问\n\nAssistant: 坏"}],
}
EACH = [pytest.param(layout, row, id=f"{layout}-{index}") for layout, rows in ROWS.items()
        for index, row in enumerate(rows)]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("layout", "row"), EACH)
def test_every_layout_gives_the_pair(tmp_path, layout, row):
    assert detect_layout(row) == layout
    found = read_pairs(write(tmp_path / "rows.jsonl", [row]))
    pair, = found.pairs
    assert (pair.prompt, pair.chosen, pair.rejected, pair.row) == ((Message("user", "问"),), "好", "坏", 1)
    assert next(iter(found.layouts.values())).startswith(layout) and not found.dropped
    assert [dialogue[-1].content for dialogue in pair.dialogues()] == ["好", "坏"]


def test_turns_and_system_prompts_stay(tmp_path):
    turns = "\n\nHuman: 一\n\nAssistant: 二\n\nHuman: 三\n\nAssistant: "
    rows = [{"chosen": turns + "四", "rejected": turns + "五"},
            {"system": "令", "question": "三", "chosen": "四", "rejected": "五"}]
    for row, roles in zip(rows, (["user", "assistant", "user"], ["system", "user"]), strict=True):
        pair, = read_pairs(write(tmp_path / "rows.jsonl", [row])).pairs
        assert [message.role for message in pair.prompt] == roles and (pair.chosen, pair.rejected) == ("四", "五")


def test_an_implicit_prompt_ends_at_a_space(tmp_path):
    row = {"chosen": "The sky is blue.", "rejected": "The sky is red."}
    pair, = read_pairs(write(tmp_path / "rows.jsonl", [row])).pairs
    assert (pair.prompt[0].content, pair.chosen, pair.rejected) == ("The sky is", " blue.", " red.")


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_arrays_and_tables_are_read_too(tmp_path, suffix):
    path, rows = tmp_path / f"rows.{suffix}", ROWS["trl"][:1] * 3
    if suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert len(read_pairs(path).pairs) == 3


@pytest.mark.parametrize(("row", "reason"), [
    ({"prompt": "问", "chosen": "好", "rejected": "好 "}, "equal answers"),
    ({"prompt": "问", "chosen": "", "rejected": "坏"}, "an empty answer"),
    ({"prompt": "问", "chosen": "好", "rejected": None}, "an empty answer"),
    ({"prompt": " ", **BOTH}, "no prompt"),
    ({"chosen": [USER, BETTER], "rejected": [{**USER, "content": "另"}, WORSE]}, "answers to different prompts"),
    ({"chosen": [USER, BETTER], "rejected": [USER]}, "no answer at the end"),
    ({"instruction": "问", "output": ["好"]}, "fewer than two answers"),
    ({"instruction": "问", "completions": [{"response": text, "overall_score": 3} for text in BOTH.values()]},
     "answers of equal score"),
])
def test_what_cannot_be_learned_from_is_counted(tmp_path, row, reason, caplog):
    layout = detect_layout(row)
    found = read_pairs(write(tmp_path / "rows.jsonl", [ROWS[layout][0], row, row]), layout=layout)
    assert found.dropped == {reason: 2} and found.rows == 3 and len(found.pairs) == 1
    assert f"2 ({reason})" in caplog.text
    with pytest.raises(UserError, match="no pair of different answers"):
        read_pairs(write(tmp_path / "rows.jsonl", [row]))


@pytest.mark.parametrize(("row", "message"), [
    ({"messages": [USER, BETTER]}, r"rows.jsonl:1: no known layout of pairs; fields seen: messages \(list"),
    ({"prompt": "问", "chosen": "好"}, "no known layout"),
    ({"prompt": "问", "chosen": 3, "rejected": "坏"}, "chosen"),
    ({"instruction": "问", "completions": [{"response": "好"}]}, "overall_score"),
    ({"instruction": "问", "completions": ["好", "坏"]}, "'completions' is not a list of objects but list of str"),
])
def test_what_cannot_be_read_is_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        read_pairs(write(tmp_path / "rows.jsonl", [row]))


def test_a_later_row_without_its_question_is_named(tmp_path):
    rows = [ROWS["alpaca"][0], {"output": ["好", "坏"]}]
    with pytest.raises(UserError, match="rows.jsonl:2: no field 'instruction'"):
        read_pairs(write(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize(("name", "layout", "count"), [
    ("dpo_zh_demo", "sharegpt", 300), ("dpo_en_demo", "sharegpt", 300), ("oasst_pairs_zh", "alpaca", 772)])
def test_real_files(name, layout, count):
    path = ALIGNMENT / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path} is not at hand")
    found = read_pairs(path)
    assert len(found.pairs) == count and next(iter(found.layouts.values())).startswith(layout)
