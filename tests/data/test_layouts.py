"""Every field of every layout becomes what the tables say, and preference rows keep their prompts as TRL keeps them."""

import copy
import itertools
import json
import re
from pathlib import Path

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.data import layouts
from ctllm_jax.data.chat import Message
from ctllm_jax.data.conversations import read_conversations
from ctllm_jax.data.layouts import DIALOGUES, PAIRS
from ctllm_jax.data.pairs import read_pairs
from ctllm_jax.data.prompts import read_prompts

U, A, S = (lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant", "system"))
BASES = {  # layout -> a row whose question is 问 and whose answer is 答 (and 错), and the field that asks
    ("dialogues", "messages"): ({"messages": [U("问"), A("答")]}, None),
    ("dialogues", "sharegpt"): ({"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
                                None),
    ("dialogues", "alpaca"): ({"instruction": "问", "output": "答"}, "instruction"),
    ("dialogues", "prompt"): ({"query": "问", "response": "答"}, "query"),
    ("pairs", "trl"): ({"query": "问", "chosen": "答", "rejected": "错"}, "query"),
    ("pairs", "sharegpt"): ({"conversations": [{"from": "human", "value": "问"}], "chosen": "答", "rejected": "错"},
                            None),
    ("pairs", "alpaca"): ({"instruction": "问", "output": ["答", "错"]}, "instruction"),
    ("pairs", "ultrafeedback"): ({"instruction": "问", "completions": [
        {"response": "错", "overall_score": 1}, {"response": "答", "overall_score": 2}]}, "instruction"),
    ("pairs", "hh"): ({"chosen": "\n\nHuman: 问\n\nAssistant: 答",
                       "rejected": "\n\nHuman: 问\n\nAssistant: 错"}, None),
}
READERS = {"dialogues": read_conversations, "pairs": read_pairs}
TABLES = {"dialogues": DIALOGUES, "pairs": PAIRS}


def read(folder, kind, layout, *rows):
    """(the dialogue that each row gives, or None where none is left; what was left out)."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    try:
        found = READERS[kind](path, layout=layout)
    except UserError as error:
        return None, re.search(r"\{.*\}", str(error))[0]
    if kind == "dialogues":
        return [(one.role, one.content) for one in found.dialogues[0].messages], found.dropped
    pair, = found.pairs
    assert pair.rejected == "错"
    return [(one.role, one.content) for one in (*pair.prompt, Message("assistant", pair.chosen))], found.dropped


@pytest.mark.parametrize(("kind", "layout"), [(kind, layout) for kind, table in TABLES.items() for layout in table])
def test_every_cell_of_the_tables(tmp_path, kind, layout):
    for field, becomes in TABLES[kind][layout].items():
        check_cell(tmp_path, kind, layout, field, becomes)


def check_cell(tmp_path, kind, layout, field, becomes):
    base, asks = BASES[kind, layout]
    plain = [("user", "问"), ("assistant", "答")]
    assert read(tmp_path, kind, layout, base) == (plain, {})
    assert read(tmp_path, kind, layout, {field: None, **base}) == (plain, {})

    def changed(value):
        return read(tmp_path, kind, layout, {**base, field: value})

    if becomes == layouts.SYSTEM:
        assert changed("令") == ([("system", "令"), *plain], {})
    elif becomes == layouts.LABEL:
        assert changed(True) == (plain, {}) and changed(False) == (None, "{'label is false': 1}")
    elif becomes == layouts.REFUSED:
        assert changed([{"x": "y"}]) == (None, str({f"field {field!r}": 1})) and changed("[]") == (plain, {})
    elif becomes == layouts.COPY or becomes == layouts.QUESTION and field != asks:
        assert changed("问") == (plain, {})
        found, reason = changed("别")
        if (kind, layout, field) in {("dialogues", "prompt", "prompt"), ("pairs", "trl", "prompt"),
                                     ("pairs", "trl", "question")}:
            asks = field  # it stands before `query` where both ask
        assert found is None and f"field '{'query' if field == asks else field}', which" in reason
    elif becomes == layouts.CONTEXT:
        assert changed("文") == ([("user", "文\n\n问"), plain[1]], {})
        assert changed({"x": ["文"]}) == (None, "{'a context that is not text': 1}")
    elif becomes == layouts.INPUT:
        assert changed("句") == ([("user", "问\n句"), plain[1]], {})
    elif becomes == layouts.HISTORY:
        assert changed([["甲", "乙"]]) == ([("user", "甲"), ("assistant", "乙"), *plain], {})
    elif becomes == layouts.REJECTED and kind == "dialogues":
        assert changed("错") == (plain, {})
    elif field not in base:  # another name for the messages or the answer of this layout
        if becomes == layouts.DIALOGUE:
            name = next(iter(base))
            assert read(tmp_path, kind, layout, {field: base[name]}) == (plain, {})
        elif layout == "prompt":
            asked = {"completion": "prompt", "answer": "question", "chosen": "query"}[field]
            assert read(tmp_path, kind, layout, {asked: "问", field: "答"}) == (plain, {})
        else:
            assert field == "chosen" and read(tmp_path, kind, layout, {"prompt": "问", field: [A("答")]})[0] == plain
    else:  # what the base row itself is made of
        without = {name: value for name, value in base.items() if name != field}
        (tmp_path / "rows.jsonl").write_text(json.dumps(without))
        with pytest.raises(UserError, match="no known layout|holds no"):
            READERS[kind](tmp_path / "rows.jsonl")


@pytest.mark.parametrize(("extra", "outcome"), [
    ({"weight": 0.5}, 0.5), ({"weight": 0}, 0.0), ({"train": False}, 0.0), ({"train": True, "weight": 2}, 2.0),
    ({"training": False, "weight": 2}, 0.0), ({"loss": False}, 0.0), ({"train": None}, 1.0),
    ({"reasoning_content": "想"}, "reasoning_content"), ({"reasoning_content": ""}, 1.0),
    ({"thinking": "想"}, "thinking"),
    ({"function_call": {"name": "f", "arguments": "{}"}}, "function_call"),
    ({"function_call": {"name": None, "arguments": None}}, 1.0), ({"tool_calls": [{"id": "1"}]}, "tool_calls"),
    ({"images": ["a.png"]}, "images"), ({"images": []}, 1.0), ({"refusal": "不"}, "refusal")])
def test_fields_of_a_message_are_used_or_leave_the_row_out(tmp_path, extra, outcome):
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [U("问"), {**A("答"), **extra}]}, {"messages": [U("一"), A("二")]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_conversations(path)
    if isinstance(outcome, str):
        assert found.dropped == {f"field {outcome!r} of a message": 1} and len(found.dialogues) == 1
    else:
        assert found.dialogues[0].messages[-1] == Message("assistant", "答", outcome) and not found.dropped


@pytest.mark.parametrize(("row", "outcome"), [
    ({"messages": [{"role": "User", "content": "问"}, {"role": "Assistant", "content": "答"}]}, "user assistant"),
    ({"messages": [{"role": "developer", "content": "令"}, U("问"), A("答")]}, "system user assistant"),
    ({"messages": [U("一"), U("二"), A("三"), A("四")]}, "user user assistant assistant"),
    ({"messages": [A("您好"), U("问"), A("答")]}, "assistant user assistant"),
    ({"messages": [U("问"), {"role": "tool", "content": "果"}, A("答")]}, {"role 'tool'": 1}),
    ({"conversations": [{"from": "human", "value": "问"}, {"from": "observation", "value": "果"},
                        {"from": "gpt", "value": "答"}]}, {"role 'observation'": 1}),
    ({"system": "令", "messages": [S("令"), U("问"), A("答")]}, "system user assistant"),
    ({"system": "别", "messages": [S("令"), U("问"), A("答")]}, {"two different system messages": 1}),
    ({"instruction": "问", "output": "答", "prompt": "# 指令\n问\n# 答案\n答\n"}, "user assistant"),
    ({"instruction": "问", "output": "答", "prompt": "你是海盗。问"},
     {"field 'prompt', which the messages do not contain": 1}),
    ({"prompt": [U("问")], "context": "文", "completion": "答"},
     {"field 'context', which the messages do not contain": 1}),
    ({"prompt": "问", "completion": [U("别"), A("答")]}, {"the question is not among the messages of its answer": 1}),
    ({"question": "问", "options": ["甲", "乙"], "answer": "甲"}, {"field 'options'": 1})])
def test_a_row_is_read_whole_or_left_out(tmp_path, row, outcome):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    if isinstance(outcome, dict):
        with pytest.raises(UserError, match=re.escape(str(outcome))):
            read_conversations(path)
    else:
        assert " ".join(one.role for one in read_conversations(path).dialogues[0].messages) == outcome


PROMPTS = {"text": "问", "list": [U("问")], "system": [S("令"), U("问")], "turns": [U("一"), A("二"), U("问")]}
TAILS = {"answer": [], "turn": [A("甲"), U("追问")]}
EACH = list(itertools.product(PROMPTS, TAILS, ["apart", "repeated", "question", "implicit", "sharegpt"]))


@pytest.mark.parametrize(("prompt", "tail", "how"), EACH)
def test_a_preference_row_keeps_what_trl_keeps_and_nothing_twice(tmp_path, prompt, tail, how):
    """TRL joins a prompt of messages with each answer, ignores a prompt that is text, and keeps a repeated question."""
    messages = [U(PROMPTS[prompt])] if prompt == "text" else PROMPTS[prompt]
    repeated = {"apart": [], "repeated": messages, "question": messages[-1:], "implicit": messages,
                "sharegpt": messages[-1:]}[how]
    sides = {name: [*repeated, *TAILS[tail], A(answer)] for name, answer in (("chosen", "好"), ("rejected", "坏"))}
    row = sides if how == "implicit" else {"prompt": PROMPTS[prompt], **sides}
    if how == "sharegpt":
        row = {"conversations": messages, **sides}
    expected = [(one["role"], one["content"]) for one in (*messages, *TAILS[tail])]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False))
    pair, = read_pairs(path).pairs
    assert ([tuple(one[:2]) for one in pair.prompt], pair.chosen, pair.rejected) == (expected, "好", "坏")
    dialogue, = read_conversations(path).dialogues
    assert [tuple(one[:2]) for one in dialogue.messages] == [*expected, ("assistant", "好")]
    given, = read_prompts(path, with_answers=True).prompts
    assert [tuple(one[:2]) for one in given.messages] == expected and given.answer == "好"


@pytest.mark.slow  # importing TRL takes most of a minute
@pytest.mark.parity
@pytest.mark.parametrize(("prompt", "tail", "how"), [
    each for each in EACH if each[2] != "sharegpt" and (each[0] != "text" or each[2] in ("repeated", "implicit"))])
def test_the_prompts_are_those_of_trl(tmp_path, prompt, tail, how):
    data_utils = pytest.importorskip("trl.data_utils")
    messages = [U("问")] if prompt == "text" else PROMPTS[prompt]
    repeated = {"apart": [], "repeated": messages, "question": messages[-1:], "implicit": messages}[how]
    sides = {name: [*repeated, *TAILS[tail], A(answer)] for name, answer in (("chosen", "好"), ("rejected", "坏"))}
    row = sides if how == "implicit" else {"prompt": PROMPTS[prompt], **sides}
    theirs = data_utils.maybe_extract_prompt(copy.deepcopy(row))
    dialogue = theirs["prompt"] + theirs["chosen"]
    if how in ("repeated", "question") and prompt != "text":
        start = len(theirs["prompt"])  # TRL keeps what the answer repeats a second time
        assert dialogue[start:start + len(repeated)] == repeated
        del dialogue[start:start + len(repeated)]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False))
    ours = read_pairs(path).pairs[0].dialogues()[0]
    assert [one[:2] for one in ours] == [(one["role"], one["content"]) for one in dialogue]


def test_weights_of_answers_are_not_lost_where_nothing_could_use_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": [U("问")], "chosen": [{**A("好"), "train": False}], "rejected": [A("坏")]}
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match="a weight on an answer of a pair"):
        read_pairs(path)
    with pytest.raises(UserError, match="a last answer of weight 0"):
        read_prompts(path, with_answers=True)
    assert read_conversations(path).dialogues[0].messages[-1].weight == 0


def test_fields_that_nothing_reads_are_reported_once(tmp_path, caplog):
    rows = [{"id": n, "source": "", "messages": [{**U("问"), "name": "甲"}, A("答")]} for n in range(1, 4)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    read_conversations(path)
    said = [record.message for record in caplog.records if "not read" in record.message]
    assert said == [f"{path}: fields that are not read: id (3 rows), messages[].name (3 rows)"]


def test_the_documentation_has_the_same_table():
    text = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines()
            if line.startswith("| `") and line.count("|") == 10]
    columns = [DIALOGUES["messages"], DIALOGUES["alpaca"], DIALOGUES["prompt"], *PAIRS.values()]
    shown = {name: cells for fields, *cells in rows for name in re.findall(r"`(\w+)`", fields)}
    assert shown == {name: [fields.get(name, "–") for fields in columns]
                     for name in dict.fromkeys(itertools.chain.from_iterable(columns))}
    assert DIALOGUES["sharegpt"] == DIALOGUES["messages"]
