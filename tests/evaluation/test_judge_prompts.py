"""What a judge is asked."""

import json
import re
from pathlib import Path

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.data.questions import Question
from ctllm_jax.evaluation.judge.prompts import PROMPTS, pair, read_prompts, single

MT_BENCH = Path(__file__).resolve().parents[3] / "shared" / "data" / "eval" / "mt-bench-zh" / "judge_prompts.jsonl"
QUESTION = Question("1", "math", ("一加一？", "再加一？"), ("得二", "得三"), "set.jsonl:1")
ANSWERS = ("是{answer_b}二", "是三 {question}")


@pytest.mark.parametrize("place", PROMPTS, ids=str)
def test_prompts_hold_all_that_is_judged_once_and_nothing_is_expanded_twice(place):
    kind, has_reference, is_second = place
    question = QUESTION if has_reference else QUESTION._replace(references=())
    turns = ANSWERS if is_second else ANSWERS[:1]
    sides = ((turns,) if kind == "single" else (turns, ("另一个甲", "另一个乙")[:len(turns)]))
    prompt, messages = (single if kind == "single" else pair)(PROMPTS, question, *sides)
    assert prompt is PROMPTS[place] and [message.role for message in messages] == ["system", "user"]
    text = messages[1].content
    parts = [*question.turns[:len(turns)], *question.references[:len(turns)]]
    assert all(text.count(answer) == 1 for side in sides for answer in side) and all(part in text for part in parts)
    assert ("得三" in text) == (has_reference and is_second)
    # The braces of the answers are all that are left.
    assert len(re.findall(r"\{\w+\}", text)) == len(re.findall(r"\{\w+\}", "".join(turns)))
    assert ("[[A]]" in text) == (kind == "pair") and ("[[5]]" in text) == (kind == "single")


def test_a_reference_is_used_where_all_turns_so_far_have_one():
    assert single(PROMPTS, QUESTION._replace(references=("得二",)), ANSWERS)[0].name == "single-turn-2"
    assert single(PROMPTS, QUESTION._replace(references=("得二",)), ANSWERS[:1])[0].name == "single-reference"


def test_hashes_are_of_every_text():
    assert len({prompt.sha256 for prompt in PROMPTS.values()}) == len(PROMPTS) == 8
    prompt = PROMPTS["single", False, False]
    for field in ("system", "template", "again"):
        assert prompt._replace(**{field: "x"}).sha256 != prompt.sha256
    assert prompt._replace(name="x").sha256 == prompt.sha256


def rows(*names, template="问：{question} 答：{answer}"):
    return [{"name": name, "type": "single", "system_prompt": "评", "prompt_template": template} for name in names]


def write(path, given):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given), encoding="utf-8")
    return path


SINGLE = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")


def test_prompts_of_a_file_in_mt_benchs_layout(tmp_path):
    given = [*rows(*SINGLE), *rows("zh_single-v1", template="中文 {question}／{answer}")]
    prompts = read_prompts(write(tmp_path / "prompts.jsonl", given))
    assert len(prompts) == 4 and prompts["single", False, False].name == "zh_single-v1"
    _, messages = single(prompts, QUESTION._replace(references=()), ANSWERS[:1])
    assert [message.content for message in messages] == ["评", "中文 一加一？／是{answer_b}二"]
    with pytest.raises(UserError, match=r"judge.prompts has no prompt pair-v2, which compare needs"):
        pair(prompts, QUESTION._replace(references=()), ANSWERS[:1], ANSWERS[:1])


@pytest.mark.parametrize(("given", "complaint"), [
    (rows(*SINGLE[:3]), "has no prompt zh_single-math-v1-multi-turn or single-math-v1-multi-turn; it has single-v1"),
    (rows(*SINGLE, template="{anwser}"), r":1: no field \{anwser\}: there are answer"),
    ([{"name": "x"}], ":1: a prompt is an object"), ([{**rows("x")[0], "name": 3}], ":1: name, system_prompt"),
], ids=str)
def test_a_file_of_prompts_that_is_none(given, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        read_prompts(write(tmp_path / "prompts.jsonl", given))


def test_mt_benchs_own_prompts_in_chinese():
    if not MT_BENCH.exists():
        pytest.skip(f"no {MT_BENCH.name} of MT-Bench beside the checkout")
    prompts = read_prompts(MT_BENCH)
    assert len(prompts) == 8 and prompts["single", True, True].name == "zh_single-math-v1-multi-turn"
    text = single(prompts, QUESTION, ANSWERS)[1][-1].content
    assert all(part in text for part in (*QUESTION.turns, *QUESTION.references, *ANSWERS))
