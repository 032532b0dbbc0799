"""Every layout gives its messages, and what gives none is counted or named."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.data.chat import Message
from ctllm_jax.data.conversations import detect_layout, read_conversations

ALIGNMENT = Path(__file__).resolve().parents[3] / "shared" / "data" / "alignment"
U, A, S = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system"))
ONE = (U("问"), A("答"))
ROWS = [
    ("messages", {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}, ONE),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "问"}]},
                               {"role": "assistant", "content": "答", "weight": 0.5}]},
     (U("问"), Message("assistant", "答", 0.5))),
    ("messages", {"conversation": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}, ONE),
    ("sharegpt", {"system": "好", "conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"},
                                                   {"from": "user", "value": "2"}, {"from": "bot", "value": "3"}]},
     (S("好"), *ONE, U("2"), A("3"))),
    ("sharegpt", {"conversations": [{"from": "system", "value": "好"}, {"from": "human", "value": "问"},
                                    {"from": "gpt", "value": "答"}]}, (S("好"), *ONE)),
    ("sharegpt", {"conversations": [{"from": "human", "value": "问"}], "chosen": {"from": "gpt", "value": "答"},
                  "rejected": {"from": "gpt", "value": "错"}}, ONE),
    ("alpaca", {"instruction": "问", "input": "", "output": "答"}, ONE),
    ("alpaca", {"instruction": "问", "input": "句", "output": "答", "history": [["1", "2"]], "system": "好"},
     (S("好"), U("1"), A("2"), U("问\n句"), A("答"))),
    ("alpaca", {"instruction": "问", "input": None, "output": ["答", "错"], "history": None}, ONE),
    ("prompt", {"prompt": "问", "completion": "答"}, ONE),
    ("prompt", {"question": "问", "answer": "答", "source": "x"}, ONE),
    ("prompt", {"prompt": [{"role": "user", "content": "问"}], "completion": [{"role": "assistant", "content": "答"}]},
     ONE),
    ("prompt", {"prompt": "问", "chosen": "答", "rejected": "错"}, ONE),
    ("messages", {"prompt": "问", "chosen": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}],
                  "rejected": []}, ONE),
    ("messages", {"prompt": [{"role": "user", "content": "问"}], "chosen": [{"role": "assistant", "content": "答"}]},
     ONE),
]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("layout", "row", "messages"), ROWS)
def test_a_row_of_each_layout(tmp_path, layout, row, messages):
    assert detect_layout(row) == layout
    path = write_lines(tmp_path / "rows.jsonl", [row])
    read = read_conversations(path)
    assert [dialogue.messages for dialogue in read.dialogues] == [messages]
    assert read.layouts[str(path)].startswith(f"{layout} (")
    assert read.layouts[str(path)].endswith("the chosen answer of each pair") == ("错" in str(row) or "chosen" in row)
    assert (read.rows, read.dropped) == (1, {})
    assert read_conversations(path, layout=layout).dialogues == read.dialogues


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "lines.json", "array.json",
                                  pytest.param("parquet", marks=pytest.mark.prep)])
def test_every_kind_of_file(tmp_path, form):
    answer = {"role": "assistant", "content": "答", "weight": None}
    rows = [{"messages": [{"role": "user", "content": f"问{n}"}, answer]} for n in range(3)]
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif form == "array.json":
        path.write_text("\ufeff\n" + json.dumps(rows, indent=1), encoding="utf-8")
    else:
        write_lines(path, rows)
        if form == "jsonl.gz":
            path.write_bytes(gzip.compress(path.read_bytes()))
    read = read_conversations(path)
    assert [(dialogue.messages[0].content, dialogue.row) for dialogue in read.dialogues] == [("问0", 1), ("问1", 2),
                                                                                             ("问2", 3)]
    assert {dialogue.file for dialogue in read.dialogues} == {path}


def test_a_folder_is_its_files_each_in_its_own_layout(tmp_path):
    write_lines(tmp_path / "b.jsonl", [ROWS[0][1]])
    write_lines(tmp_path / "a.jsonl", [ROWS[3][1]])
    (tmp_path / "README.md").write_text("x")
    read = read_conversations(tmp_path)
    assert [layout.partition(" ")[0] for layout in read.layouts.values()] == ["sharegpt", "messages"]
    assert len(read.dialogues) == 2


@pytest.mark.parametrize(("row", "reason"), [
    ({"instruction": "问", "output": ""}, "no answer"),
    ({"instruction": "问", "output": None}, "no answer"),
    ({"instruction": "问", "output": []}, "no answer"),
    ({"instruction": " ", "input": "", "output": "答"}, "an empty message before the last answer"),
    ({"prompt": "问", "completion": " \n"}, "no answer"),
    ({"messages": []}, "no answer"),
    ({"messages": [{"role": "user", "content": "问"}]}, "no answer"),
    ({"messages": [{"role": "assistant", "content": "答"}]}, "no question"),
    ({"messages": [{"role": "user", "content": "问"}, {"role": "tool", "content": "1"}]}, "role 'tool'"),
    ({"messages": [{"role": "assistant", "content": None}]}, "a message without text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content that is not text"),
    ({"messages": [{"role": "user", "content": "1"}, {"role": "system", "content": "2"},
                   {"role": "assistant", "content": "3"}]}, "system prompt after the first message"),
])
def test_a_row_of_no_use_is_dropped_and_counted(tmp_path, row, reason):
    layout = "messages" if "messages" in row else "alpaca" if "instruction" in row else "prompt"
    good = next(good for name, good, _ in ROWS if name == layout)
    read = read_conversations(write_lines(tmp_path / "rows.jsonl", [good, row, good, row]))
    assert [dialogue.row for dialogue in read.dialogues] == [1, 3]
    assert (read.rows, read.dropped) == (4, {reason: 2})


def test_what_follows_the_last_answer_is_cut_off(tmp_path):
    row = {"messages": [{"role": role, "content": text} for role, text in
                        [("system", " "), ("user", "问"), ("assistant", "答"), ("user", "2"), ("assistant", "")]]}
    assert read_conversations(write_lines(tmp_path / "rows.jsonl", [row])).dialogues[0].messages == ONE


@pytest.mark.parametrize(("bad", "complaint"), [
    ("{", "malformed JSON"),
    ("[1]", "not an object but list"),
    ('{"instruction": "x"}', "no field 'output'; its fields are instruction"),
    ('{"instruction": "x", "output": 3}', "field 'output' is not text but int"),
    ('{"instruction": "x", "output": "\\ud800"}', "half of a surrogate pair"),
    ('{"instruction": "x", "output": "y", "history": ["a"]}', "list of pairs"),
])
def test_a_row_that_cannot_be_read_is_named(tmp_path, caplog, bad, complaint):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[6][1])
    path.write_text(f"{good}\n{bad}\n{good}\n")
    with pytest.raises(UserError, match=f"rows.jsonl:2: .*{complaint}"):
        read_conversations(path)
    read = read_conversations(path, max_bad=1, quarantine=tmp_path / "bad.jsonl")
    assert [dialogue.row for dialogue in read.dialogues] == [1, 3]
    assert (read.rows, read.dropped) == (3, {"unreadable": 1})
    assert json.loads((tmp_path / "bad.jsonl").read_text())["line"] == 2
    assert re.search(f"rows.jsonl:2 is left out: .*{complaint}", caplog.text)


@pytest.mark.parametrize(("entry", "complaint"), [
    ({"role": "user"}, "a message needs role and content; it has role"),
    ("x", "it has str"),
    ({"role": "assistant", "content": "x", "weight": -1}, "weight=-1 must be"),
    ({"role": "assistant", "content": 5}, "is not text but int"),
])
def test_a_broken_message_is_named(tmp_path, entry, complaint):
    path = write_lines(tmp_path / "rows.jsonl", [ROWS[0][1], {"messages": [{"role": "user", "content": "x"}, entry]}])
    with pytest.raises(UserError, match=f"rows.jsonl:2: .*{complaint}"):
        read_conversations(path)


def test_an_unknown_layout_names_what_was_seen(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"ask": "x", "turns": [{"a": 1, "b": 2}], "n": None}])
    seen = r"ask \(text\), turns \(list of \{a, b\}\), n \(null\); needed: messages"
    with pytest.raises(UserError, match=f"rows.jsonl:1: no known layout .*seen: {seen}"):
        read_conversations(path)


@pytest.mark.parametrize(("name", "content", "complaint"), [
    ("a.json", "[{},\n{]", r"a.json:2: malformed JSON array"),
    ("a.json", b"[\n\n\xff]", r"a.json:3: invalid UTF-8"),
    ("a.json", "[" * 100_000, r"a.json: malformed JSON array: nested too deeply"),
    ("a.parquet", "x", "Parquet file is damaged"),
    ("a.csv", "x", "must end in one of .jsonl"),
    ("a.jsonl", "", "holds no dialogue with an answer"),
])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=complaint):
        read_conversations(tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        read_conversations(tmp_path / "none.json")


@pytest.mark.parametrize(("name", "layout", "count", "turns"), [
    ("oasst_sft_zh.json", "alpaca", 689, {2: 299, 4: 331, 6: 59}),
    ("oasst_pairs_zh.json", "alpaca", 775, None),
    ("dpo_zh_demo.json", "sharegpt", 300, {2: 236, 3: 64}),
    ("dpo_en_demo.json", "sharegpt", 300, None),
])
def test_real_files(name, layout, count, turns):
    if not ALIGNMENT.is_dir():
        pytest.skip(f"no alignment data at {ALIGNMENT}")
    read = read_conversations(ALIGNMENT / name)
    assert next(iter(read.layouts.values())).startswith(layout)
    assert (len(read.dialogues), read.dropped) == (count, {})
    assert all(dialogue.messages[-1].role == "assistant" for dialogue in read.dialogues)
    if turns:
        assert Counter(len(dialogue.messages) for dialogue in read.dialogues) == turns
