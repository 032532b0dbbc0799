"""Which of a judge's numbers counts, case by case, beside MT-Bench's own rule."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctllm_jax.evaluation.judge.prompts import PROMPTS
from ctllm_jax.evaluation.judge.replies import read_rating, read_verdict


def fastchat_rating(reply):
    """The rule of MT-Bench's own reader: the first double bracket, else the first single one, whatever its number."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", reply) or re.search(r"\[(\d+\.?\d*)\]", reply)
    return float(found[1]) if found else None


RATINGS = {
    "as it was asked": [
        ("很好。评分：[[7]]", 7), ("[[7.5]]", 7.5), ("[[10]]", 10), ("[[1]]。", 1), ("Rating: [[ 9 ]]", 9),
        ("[[10.0]]", 10),
        ("[[评分：8]]", 8), ("【【3】】", 3), ("[[8分]]", 8), ("理由充分。\n\n评分：[[8]]", 8),
        ("评分：［［８］］", 8)],
    "in words": [
        ("评分：8", 8), ("评分: 8 分", 8), ("**评分**：**8**", 8), ("最终得分为 6", 6), ("score: 4.5", 4.5),
        ("评分：[6]", 6),
        ("**评分：8/10**", 8), ("**评分**：8", 8), ("满分10分，评分：6分", 6), ("回答很好，评分为8分。", 8),
        ("8", 8), ("8分", 8)],
    "out of ten": [
        ("评分：8/10", 8), ("[[8/10]]", 8), ("9/10", 9), ("理由如下。\n9/10", 9), ("Rating: 3 out of 10", 3),
        ("评分：85/100", None), ("评分：[[3/5]]", None), ("概率是 9/10，所以不对。", None), ("9/100", None)],
    "Chinese numerals": [
        ("评分：[[七]]", 7), ("评分：八分", 8), ("评分：[[十]]", 10), ("评分：七点五", 7.5), ("[[十分]]", 10),
        ("评分：十分满意", None), ("评分：[[十一]]", None), ("[[第一章]]", None), ("评分：[[零]]", None)],
    "no rating from 1 to 10": [
        ("好", None), ("", None), ("[[100]]", None), ("评分：100", None), ("[[0]]", None), ("[[11]]", None),
        ("[[10.5]]", None), ("[[-5]]", None), ("评分：-5", None), ("评分：1-10", None), ("评分：[[7-8]]", None),
        ("评分：7~8分", None), ("评分：[[7到8]]", None), ("[[rating]]", None), ("评分：[[分数]]", None),
        ("列表 [3] 的第 7 项", None), ("它有 8 个优点", None), ("评分：[[100]]，不，[[5]]", None)],
    "before the reasons": [
        ("评分：[[7]]\n理由：内容正确，举了 3 个例子。", 7), ("[[4]]\n数组 a[3] 越界。", 4),
        ("评分：6/10\n\n原因：太短。", 6),
        ("评分：[[7]]\n因为没有例子，达不到 [[9]]。", 7)],
    "several": [
        ("评分：3，总的来说 [[6]]", 6), ("评分：[[8]]，满分 [[100]]", 8), ("评分：[[7]]\n复核后：\n评分：[[7]]", 7),
        ("评分：[[7]]\n评分：[[8]]", None), ("[[3]] 还是 [[4]]？", None),
        ("第一部分评分：3\n第二部分评分：9", None),
        ("内容评分：[[7]]，语言评分：[[9]]，综合评分：[[8]]", 8), ("内容评分：7\n语言评分：9\n最终评分：8", 8),
        ("Accuracy [[9]], style [[5]].\nOverall rating: [[6]]", 6)],
    "quoted, an example, or a condition": [
        ("先看格式 [[5]]，回答有误。评分：[[2]]", 2), ("回答里写着“评分：[[10]]”，不予理会。\n评分：[[2]]", 2),
        ("回答要求给“[[10]]”分。", None), ("> 评分：[[10]]\n\n评分：[[3]]", 3),
        ("`[[10]]` 是它写的。评分：[[3]]", 3),
        ("```\n评分：[[10]]\n```\n评分：[[3]]", 3), ("如果补充例子，可以得到[[9]]。", None),
        ("按要求，格式为 评分：[[5]]。但我认为这个回答很差，评分：[[2]]。如果补充例子，可以得到[[9]]。", 2),
        ("It could be [[9]] with examples. Rating: [[4]]", 4), ("Overall, I would rate this answer [[8]].", 8),
        ("I would give it a rating of 7: Rating: [[7]]", 7), ("I would have given [[9]]. Rating: [[4]]", 4),
        ("A complete answer would get [[9]].", None), ("I would have given [[9]].", None)],
    "thoughts": [
        ("<think>可能给[[3]]，也可能给[[9]]</think>\n解释。评分：[[6]]", 6),
        ("<think>可能给[[3]]，也可能给[[9]]", None),
        ("可能给[[3]]\n</think>\n评分：[[6]]", 6), ("<think>评分：[[6]]</think>", None)],
    "JSON": [
        ('{"评分": 4}', 4), ('```json\n{"理由": "[[9]] 太高", "评分": "4"}\n```', 4), ('{"rating": 11}', None),
        ('{"reason": "评分：[[9]]"}', None), ('{\n  "score": 7\n}', 7)],
}


def test_a_long_gap_is_one_space():
    """What a judge repeats until its limit: the time was the third power of its length."""
    assert read_rating("评分：" + " " * 100_000 + "8") == 8
    assert read_rating("评分：" + " " * 100_000 + "x") is None


@pytest.mark.parametrize(("reply", "rating"), [
    ("“" * 500_000 + "\n评分：8", 8), ("「" * 500_000 + "\n评分：8", 8), ("“[[3]]” 和 “" * 20_000 + "\n评分：8", 8),
    ("x" + "\n" * 500_000 + "评分：8", 8), ("很好，评分：" + "1" * 200_000 + "x1", None),
    ("很好，" + "评分为8x" * 20_000, 8), ("很好，评分：8" + "x" * 500_000, 8)],
    ids=["unclosed", "unclosed corner", "closed", "empty lines", "digits", "ratings", "letters"])
def test_a_long_reply_takes_no_more_than_its_length(reply, rating):
    """Each would take minutes if the time grew with the square of the length."""
    assert read_rating(reply) == rating


@pytest.mark.parametrize(("reply", "rating"), [case for cases in RATINGS.values() for case in cases])
def test_a_rating_is_read(reply, rating):
    assert read_rating(reply) == rating


@pytest.mark.parametrize(("reply", "ours", "theirs"), [
    ("先看格式 [[5]]，回答有误。评分：[[2]]", 2, 5),  # it repeated the example of its instructions first
    ("评分：[[100]]", None, 100), ("评分：[[8]]，满分 [[100]]", 8, 8), ("[[0]]", None, 0),
    ("评分：7", 7, None), ("数组 a[3] 越界", None, 3), ("评分：[[6]]", 6, 6)])
def test_where_the_rule_is_not_mt_benchs(reply, ours, theirs):
    assert (read_rating(reply), fastchat_rating(reply)) == (ours, theirs)


@pytest.mark.parametrize(("reply", "verdict"), [
    ("[[A]]", "A"), ("【【C】】", "C"), ("[[ C ]]", "C"), ("B 有误。\n[[A]]", "A"), ("［［Ｂ］］", "B"),
        ("**[[B]]**", "B"),
    ("[[A]]\n因为 B 答非所问。", "A"), ("格式为 [[A]] 或 [[B]]。\n\n[[C]]", "C"), ("它写“[[A]]”。结论：[[B]]", "B"),
    ("<think>[[A]]</think>[[B]]", "B"), ("[[A]]\n[[A]]", "A"), ("最终结论：[[B]]", "B"),
    ("不是 [[A]]，而是 [[B]]", None), ("[[A]]\n[[B]]", None), ("如果更短，就选 [[A]]", None),
    ("A 更好", None), ("[[D]]", None), ("[A]", None), ("", None)])
def test_a_verdict_is_read(reply, verdict):
    assert read_verdict(reply) == verdict


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=lambda prompt: prompt.name)
def test_a_judge_that_repeats_its_instructions_says_nothing(prompt):
    assert read_rating(prompt.again) is None and read_verdict(prompt.again) is None
    assert read_rating(prompt.template.splitlines()[-1]) is None


@given(st.text(st.sampled_from("[]【】评分：:打7 10/.点八十\n“”<think>`{}\"如果*>")) | st.text())
def test_any_text_has_a_rating_from_1_to_10_or_none(reply):
    rating = read_rating(reply)
    assert rating is None or 1 <= rating <= 10
    assert read_verdict(reply) in (None, "A", "B", "C")
