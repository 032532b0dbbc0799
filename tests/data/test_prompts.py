"""Every layout gives its prompt, with the answer or without, and what gives none is counted."""

import json

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.data.chat import Message
from ctllm_jax.data.prompts import read_prompts
from tests.data.test_conversations import ALIGNMENT, write_lines

U, A, S = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system"))
ASK = {"role": "user", "content": "问"}
TELL = {"role": "assistant", "content": "答"}
ANSWERED = [
    {"messages": [ASK, TELL]}, {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
    {"instruction": "问", "output": "答"}, {"prompt": "问", "completion": "答"}, {"question": "问", "answer": "答"},
    {"prompt": [ASK], "chosen": [TELL], "rejected": [{**TELL, "content": "错"}]},
    {"prompt": "问", "chosen": "答", "rejected": "错"}, {"instruction": "问", "output": ["答", "错"]},
    {"conversations": [{"from": "human", "value": "问"}], "chosen": {"from": "gpt", "value": "答"},
     "rejected": {"from": "gpt", "value": "错"}},
]
ALONE = [{"messages": [ASK]}, {"prompt": "问"}, {"prompt": [ASK]}, {"question": "问"}, {"query": "问"},
         {"instruction": "问"}, {"instruction": "问", "input": ""}, {"instruction": "问", "completions": []}]


@pytest.mark.parametrize("row", ANSWERED, ids=str)
@pytest.mark.parametrize("with_answers", [True, False])
def test_a_dialogue_is_a_prompt_with_its_answer_or_without(row, with_answers, tmp_path):
    read = read_prompts(write_lines(tmp_path / "rows.jsonl", [row]), with_answers=with_answers)
    assert [prompt[:2] for prompt in read.prompts] == [((U("问"),), "答" if with_answers else None)]
    assert read.prompts[0].row == 1 and read.rows == 1 and read.dropped == {}


@pytest.mark.parametrize("row", ALONE, ids=str)
def test_a_question_alone_is_a_prompt(row, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [row])
    assert [prompt.messages for prompt in read_prompts(path, with_answers=False).prompts] == [(U("问"),)]
    with pytest.raises(UserError):
        read_prompts(path, with_answers=True)


def test_what_precedes_the_last_answer_is_the_prompt(tmp_path):
    row = {"system": "好", "instruction": "三", "output": "四", "history": [["一", "二"]]}
    path = write_lines(tmp_path / "rows.jsonl", [row, {"instruction": "再", "output": ""}])
    before = (S("好"), U("一"), A("二"), U("三"))
    read = read_prompts(path, with_answers=True)
    # An empty last answer is none; without history the row has no other.
    assert [prompt[:2] for prompt in read.prompts] == [(before, "四")] and read.dropped == {"no answer": 1}
    assert [prompt.messages for prompt in read_prompts(path, with_answers=False).prompts] == [before, (U("再"),)]


def test_an_unanswered_question_is_cut_off_where_the_answer_counts(tmp_path):
    row = {"messages": [ASK, {**TELL, "weight": 0.5}, {**ASK, "content": "还"}]}
    path = write_lines(tmp_path / "rows.jsonl", [row])
    assert read_prompts(path, with_answers=True).prompts[0][:2] == ((U("问"),), "答")
    assert read_prompts(path, with_answers=False).prompts[0].messages == (U("问"), Message("assistant", "答"), U("还"))


@pytest.mark.parametrize(("messages", "reason"), [
    ([ASK, TELL, TELL, TELL], "no question at the end"), ([], "no question at the end"),
    ([ASK, {"role": "system", "content": "好"}, ASK], "system prompt after the first message"),
    ([{**ASK, "content": " "}], "an empty message"), ([{"role": "tool", "content": "1"}, ASK], "role 'tool'")])
def test_what_cannot_be_answered_is_counted(messages, reason, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": [ASK]}, {"messages": messages, "prompt": None}])
    read = read_prompts(path, with_answers=False, layout="messages")
    assert len(read.prompts) == 1 and read.dropped == {reason: 1}


def test_an_empty_system_prompt_is_none(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": [{"role": "system", "content": " "}, ASK, TELL]}])
    assert read_prompts(path, with_answers=False).prompts[0].messages == (U("问"),)


def test_what_is_no_prompt_names_its_fields(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "问"}])
    with pytest.raises(UserError, match=r"rows.jsonl:1: no known layout of dialogues; fields seen: text \(text\)"):
        read_prompts(path, with_answers=False)
    path.write_text(json.dumps({"prompt": "问"}) + '\n{"prompt": 3}\n{"prompt"\n')
    with pytest.raises(UserError, match=r"rows.jsonl:2: field 'prompt' is not text"):
        read_prompts(path, with_answers=False)
    assert read_prompts(path, with_answers=False, max_bad=2).dropped == {"unreadable": 2}


def test_real_dialogues():
    path = ALIGNMENT / "oasst_sft_zh.json"
    if not path.exists():
        pytest.skip(f"{path} is not at hand")
    given, asked = (read_prompts(path, with_answers=with_answers) for with_answers in (True, False))
    assert len(given.prompts) == 689 and [p.messages for p in given.prompts] == [p.messages for p in asked.prompts]
    assert {len(prompt.messages) for prompt in given.prompts} == {1, 3, 5}
