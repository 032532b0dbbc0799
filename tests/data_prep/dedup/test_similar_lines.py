"""Similar lines: what the rule says, by a plain program of two loops; nothing else of a text changes."""

import random
import sys
from collections import Counter

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.prepare import SimilarLinesConfig
from data_prep.dedup import facts
from data_prep.dedup.similar_lines import drop_similar_lines, split_lines

ENDS, OPENINGS, CLOSING = "!?。！？…]】", "[【", "”’」』）》〉"
LINE = "这一行讲的是天气，今天的天气比昨天好得多，适合出门散步"


def reference_lines(text):
    """Character by character: the rule, runs of end marks, closing quotes, points within names and numbers."""
    lines, line, ended = [], "", False
    for index, char in enumerate(text):
        before, after = text[index - 1 : index], text[index + 1 : index + 2]
        inside = all(other.isascii() and other.isalnum() for other in (before, after))
        is_end = char in ENDS or char == "." and not inside
        if (ended and not is_end and char not in CLOSING or char in OPENINGS) and line:
            lines.append(line)
            line = ""
        line += char
        ended = is_end or ended and char in CLOSING
    return lines + [line] if line else lines


def edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def are_similar(a, b, config):
    shorter, longer = sorted((len(a), len(b)))
    if not any(char.isalpha() for char in a):
        return False
    if shorter <= config.exact_below or a == b:
        return a == b
    if (longer - shorter) / longer >= config.max_length_gap:
        return False
    common, everything = (Counter(a) & Counter(b)).total(), (Counter(a) | Counter(b)).total()
    if config.keep_different_facts and facts.differ(a, b):
        return False
    return common / everything >= config.min_jaccard and edit_distance(a, b) <= config.max_distance * longer + 1e-9


def reference(text, config):
    while True:
        kept = []
        for line in (lines := reference_lines(text)):
            if not any(are_similar(line.strip(), other.strip(), config) for other in kept):
                kept.append(line)
        if len(kept) == len(lines):
            return text
        text = "".join(kept)


def edited(rng, line, edits):
    for _ in range(edits):
        place = rng.randrange(len(line) or 1)
        line = line[:place] + rng.choice(["", "新", "旧的", " "]) + line[place + rng.randrange(2) :]
    return line


def document(rng, lines):
    alphabet = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往"
    texts = []
    for _ in range(lines):
        if texts and rng.random() < 0.5:
            texts.append(edited(rng, rng.choice(texts), rng.choice([0, 0, 1, 2, 3, 6])))
        else:
            texts.append("".join(rng.choices(alphabet + "ab1 ", k=rng.choice([1, 5, 14, 15, 16, 17, 20, 40, 90]))))
    ends = ["。", "。", "。", "。", "！", "……", ".", "？”", "】", "", "a.b", "。【"]
    return "".join(rng.choice(["", "\n", "\n\n", " "]) + text + rng.choice(ends) for text in texts)


@pytest.mark.parametrize("changes", [{}, {"max_distance": 0.3}, {"max_distance": 0.5, "min_jaccard": 0.8},
                                     {"max_distance": 0.5, "max_length_gap": 0.05}, {"exact_below": 0},
                                     {"exact_below": 40}, {"max_distance": 0}])
@pytest.mark.parametrize(("seed", "faithful"), [(0, True), (1, False), (2, False)])
def test_what_goes_is_what_the_rule_says(changes, seed, faithful, monkeypatch):
    monkeypatch.setattr("data_prep.dedup.similar_lines.FEW", 20)
    config, rng = SimilarLinesConfig(**changes, keep_different_facts=not faithful), random.Random(seed)
    went = 0
    for lines in (2, 10, 60):
        text = document(rng, lines)
        result = drop_similar_lines(text, config)
        assert result.text == reference(text, config)
        assert result.characters == len(text) - len(result.text)
        assert drop_similar_lines(result.text, config) == (result.text, 0, 0, ())
        went += result.lines
    assert went


@pytest.mark.parametrize(("block", "rows"), [(1, 1), (7, 3), (50, 64)])
def test_few_lines_at_a_time_are_as_many(monkeypatch, block, rows):
    text = document(random.Random(7), 80)
    expected = drop_similar_lines(text, SimilarLinesConfig())
    monkeypatch.setattr("data_prep.dedup.similar_lines.BLOCK", block)
    monkeypatch.setattr("data_prep.dedup.similar_lines.ROWS", rows)
    assert drop_similar_lines(text, SimilarLinesConfig()) == expected and expected.lines > 5


@pytest.mark.parametrize("seed", range(5))
def test_lines_make_up_the_text(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices("天ab1.。！？…[]【】”」\n ", k=2000))
    assert split_lines(text) == reference_lines(text)
    assert "".join(split_lines(text)) == text


@pytest.mark.parametrize(("text", "lines"), [
    ("好吧……行？！走。", ["好吧……", "行？！", "走。"]),
    ("“好的。”他说。", ["“好的。”", "他说。"]),
    ("圆周率是3.14。见a.com/x.html.再见", ["圆周率是3.14。", "见a.com/x.html.", "再见"]),
    ("公告【置顶】内容[1]完", ["公告", "【置顶】", "内容", "[1]", "完"]),
    ("一行\n二行", ["一行\n二行"]),
    ("", []), ("。", ["。"]),
])
def test_where_lines_end(text, lines):
    assert split_lines(text) == lines == reference_lines(text)


@pytest.mark.parametrize(("text", "expected"), [
    # Of the two the earlier stays, and the white space before the later goes with it.
    (f"{LINE}。\n中间。\n{LINE}呢。\n末尾。", f"{LINE}。\n中间。\n末尾。"),
    # Twenty-nine characters allow two edits, not three.
    (f"{LINE}。{LINE[3:]}。", f"{LINE}。{LINE[3:]}。"),
    (f"{LINE}。{LINE[2:]}。", f"{LINE}。"),
    # Fifteen characters or fewer: equal or not.
    ("今天的天气真是很不错。今天的天气真是很不错！", "今天的天气真是很不错。今天的天气真是很不错！"),
    ("很好。不错。 很好。", "很好。不错。"),
    # Marks and numbers are no copies of each other.
    ("1. 一只苹果。2. 两只梨。\n1. 三根香蕉。……【】？？……", "1. 一只苹果。2. 两只梨。\n1. 三根香蕉。……【】？？……"),
    ("他在U.S.住过，也在U.S.学习。", "他在U.S.住过，也在U.S.学习。"),
    ("", ""),
])
def test_texts(text, expected):
    assert drop_similar_lines(text, SimilarLinesConfig()).text == expected


FACTS = [
    ("2019年3月5日，公司召开董事会会议，审议通过了年度利润分配议案",
     "2020年3月8日，公司召开董事会会议，审议通过了年度利润分配议案"),
    ("本合同约定甲方应当在收到货物之后的十日之内向乙方支付全部货款",
     "本合同约定乙方应当在收到货物之后的十日之内向甲方支付全部货款"),
    ("患者服用此药以后血压由一百六十毫米汞柱降低了很多，效果非常明显",
     "患者服用此药以后血压由一百六十毫米汞柱升高了很多，效果非常明显"),
    ("将三百克面粉倒入大碗之中，慢慢地加入温水，一边加水一边搅拌",
     "将五百克面粉倒入大碗之中，慢慢地加入温水，一边加水一边搅拌"),
    ("根据本条例的规定，单位可以在网站上公布此类个人信息",
     "根据本条例的规定，单位不可以在网站上公布此类个人信息"),
    ("In the second quarter the price of copper rose by a small amount again",
     "In the second quarter the price of copper fell by a small amount again"),
    ("In the end the buyer of the house sued the man who was the seller of it",
     "In the end the seller of the house sued the man who was the buyer of it"),
    ("The committee said that the members may use these rooms after the meeting",
     "The committee said that the members may not use these rooms after the meeting"),
]


@pytest.mark.parametrize("pair", FACTS)
def test_lines_that_state_different_facts_stay(pair):
    text = "。".join(pair) + "。"
    config = SimilarLinesConfig(max_distance=0.2)
    assert drop_similar_lines(text, config) == (text, 0, 0, ())
    released = drop_similar_lines(text, config.model_copy(update={"keep_different_facts": False}))
    assert released.text == pair[0] + "。" and released.pairs == ((pair[1] + "。", pair[0] + "。"),)


@pytest.mark.parametrize("pair", [
    (f"{LINE}。", f"{LINE}呢。"), ("请您登录以后再来查看全部的评论内容哦！", "请你登录以后再来查看全部的评论内容哦！"),
    ("Please sign in to your account to see all of the comments.",
     "Please log in to your account to see all of the comments.")])
def test_lines_that_say_the_same_go(pair):
    assert drop_similar_lines("\n".join(pair), SimilarLinesConfig()).pairs == (pair[::-1],)


def test_a_chain_of_similar_lines_is_measured_from_those_that_stay():
    base = "".join(chr(0x4E00 + index) for index in range(40))
    chain = [base[: 40 - 3 * step] + "变" * (3 * step) for step in range(3)]
    result = drop_similar_lines("。".join(chain) + "。", SimilarLinesConfig())
    # The second is similar to the first; the third only to the second, which went.
    assert result.text == f"{chain[0]}。{chain[2]}。" and result.lines == 1 and result.characters == 41


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("count", "make"), [
    (20_000, lambda rng: "".join(chr(0x4E00 + rng.randrange(2000)) for _ in range(rng.randrange(16, 60))) + "。"),
    (8000, lambda rng: f"编号{rng.randrange(10**6):06d}价格为{rng.randrange(10**4)}元，库存{rng.randrange(10**3)}。"),
    (20_000, lambda rng: f"这一行和其他行几乎完全一样，只有一个数字不同{rng.randrange(10)}。"),
    (20_000, lambda rng: "a。"), (20_000, lambda rng: "。"),
], ids=["different", "template", "similar", "short", "marks"])
def test_many_lines_take_seconds(count, make):
    # Pairs grow with the square: 20,000 lines are 2e8 pairs, minutes for one edit distance each.
    rng = random.Random(0)
    text = "".join(make(rng) for _ in range(count))
    drop_similar_lines(text, SimilarLinesConfig())


def test_without_rapidfuzz_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(UserError, match=r"rapidfuzz: pip install 'ctllm-jax\[prep\]'"):
        drop_similar_lines(f"{LINE}。{LINE}呢。", SimilarLinesConfig())
