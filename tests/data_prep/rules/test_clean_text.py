"""Clean text that the web rules have to keep: marks at the ends of lines, separators, verse, lists, tables."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctllm_jax.config.prepare import FilterConfig
from data_prep.rules import RULES, Filter
from data_prep.rules.lines import LINE_RULES, drop_lines
from data_prep.rules.normalize import separators, without_separators
from data_prep.rules.view import View
from tests.data_prep.rules.test_release_faults import GOOD

WEB, PUBLISHED = (Filter(name, FilterConfig(mode="statistics")) for name in ("web", "map_cc"))

POEM = """昔人已乘黄鹤去，
此地空余黄鹤楼。
黄鹤一去不复返，
白云千载空悠悠。
晴川历历汉阳树，
芳草萋萋鹦鹉洲。
日暮乡关何处是？
烟波江上使人愁。"""
LYRICS = """小路尽头的灯
词曲：佚名
傍晚的风吹过田野
妈妈站在门口等我
炊烟慢慢升上屋顶
归来的脚步声轻轻

小路尽头的灯还亮着
照着我走过的每个秋天
无论走到多远的地方
我都记得那一点温暖
小路尽头的灯还亮着
照着我走过的每个秋天"""
LIST = """家常豆腐的做法
• 北豆腐一块，切成厚片
• 青椒两个，洗净去籽切块
• 木耳一把，提前泡发
• 油锅烧热后把豆腐煎到两面金黄
• 放入葱姜蒜爆香，再加一勺豆瓣酱
• 倒入半碗清水，小火焖五分钟
• 最后勾芡，撒上葱花即可出锅"""
TABLE = """| 城市 | 所在省份 | 著名景点 | 特色小吃 |
|------|----------|----------|----------|
| 西安 | 陕西 | 大雁塔与城墙 | 羊肉泡馍 |
| 杭州 | 浙江 | 西湖和灵隐寺 | 葱包桧 |
| 成都 | 四川 | 武侯祠、宽窄巷子 | 担担面 |
| 桂林 | 广西 | 漓江山水 | 米粉 |
| 苏州 | 江苏 | 拙政园与虎丘 | 松鼠鳜鱼 |"""
WRAPPED = """清晨，老人沿着河边慢慢散步，看见几只白鹭落在浅水里觅食。远处的
山被薄雾遮住，只露出淡淡的轮廓。他想起年轻时在外地工作的日子，那
时候每年只能回家一次，如今孩子们都长大了，村里也修好了公路，邻居
笑着问他今天是不是又要去集市买新鲜的蔬菜。"""
MENU = "\n".join("首页 新闻 体育 财经 娱乐 科技 汽车 房产 教育 健康 旅游 美食 注册 登录 帮助 关于我们 联系我们".split())


@pytest.mark.parametrize("text", [POEM, LYRICS, LIST, TABLE, WRAPPED],
                         ids=["poem", "lyrics", "list", "table", "wrapped"])
def test_verse_lists_and_tables_stay_whole(text):
    outcome = WEB.apply(text, None)
    assert outcome.failed == () and outcome.text == text
    assert "empty" in PUBLISHED.apply(text, None).failed or PUBLISHED.apply(text, None).text != text


def test_menus_go_alone_and_around_an_article():
    assert "empty" in WEB.apply(MENU, None).failed
    outcome = WEB.apply(f"{MENU}\n{GOOD * 2}{MENU}\n", None)
    assert outcome.failed == () and outcome.text.strip() == (GOOD * 2).strip()
    assert "empty" in WEB.apply("欢迎光临本站请登录后查看\n" * 30, None).failed


@pytest.mark.parametrize("line", ["=" * 80, "-" * 40, "*" * 60, "_" * 30, "~" * 50, "─" * 60, "═" * 60, "·" * 30,
                                  "—" * 40, "* * * * *", "-=-=-=-=-=-", "★☆★☆★☆", "━━━━", "........................",
                                  "#" * 70, "+------+------+", "◆◇◆◇◆", "~*~*~*~*~"])
def test_a_separator_changes_no_value(line):
    for count, text in ((1, GOOD.replace("\n", f"\n{line}\n", 1)), (6, GOOD.replace("\n", f"\n{line}\n{line}\n"))):
        outcome, without = WEB.apply(text, None), WEB.apply(GOOD, None)
        assert text.count(line) >= count and outcome.failed == () and outcome.text == text
        assert outcome.values == pytest.approx(without.values)
    in_line = WEB.apply(GOOD.replace("老人", "老人" + "=" * 80, 1), None)
    assert in_line.values["top_4gram_fraction"] == without.values["top_4gram_fraction"]


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("=-*_~─·.#甲乙a \n\u3000\t�"), max_size=60))
def test_separators_are_found_as_by_hand(text):
    cleaned = without_separators(text)
    assert cleaned.count("\n") == text.count("\n")
    assert [character for character in cleaned if character not in separators() and not character.isspace()] == \
        [character for character in text if character not in separators() and not character.isspace()]
    for line, before in zip(cleaned.split("\n"), text.split("\n"), strict=True):
        marks = "".join(before.split())
        alone = len(marks) >= 3 and all(character in "=-*_~─·.#" for character in marks)
        assert (not line) == (not before or alone)


@pytest.mark.parametrize("mark", [*"\u200b\u200c\u200d\u200e\u200f\ufeff\u2060\xad\x00\ue000\U000f0000\ufe0f\u202c",
                                  "\u3164", "[1]", "[12][13]", "（图）", "（完）", "（未完待续）", "😀", "👍🏽", "❤️",
                                  "♥", "①", "²", "’", "”", "）", " ", "\t", "\u3000", "[注释]", "【1】", "›", "^_^"])
def test_a_mark_at_the_end_of_each_line_drops_none(mark):
    text = GOOD.replace("\n", mark + "\n") * 2
    outcome = WEB.apply(text, None)
    assert outcome.failed == () and outcome.text == text and outcome.removed == {}
    one_line = GOOD.strip().replace("\n", "") + mark
    assert WEB.apply(one_line, None).text == one_line and WEB.apply(one_line, None).failed == ()


def test_map_cc_keeps_the_published_behaviour():
    text = GOOD.replace("\n", "\u200b\n")
    assert "empty" in PUBLISHED.apply(text, None).failed
    assert not [name for name in PUBLISHED.rule_set.bounds if RULES[name].code.startswith("E")]
    assert View("甲\n乙", published=True).measured == "甲\n乙" and View("=" * 9, published=True).length == 9


def test_distinct_fraction_does_not_fall_with_the_length():
    draw = random.Random(0)
    alphabet = "的一是在不了有和人这" * 20 + "".join(map(chr, range(0x4E00, 0x5100)))
    text = "".join(draw.choices(alphabet, k=9000))
    short, whole = (RULES["distinct_fraction"].measure(View(piece)) for piece in (text[:1000], text))
    assert whole == pytest.approx(short, abs=0.03)
    assert RULES["distinct_fraction"].measure(View(text, published=True)) < 0.1 < whole
    assert RULES["distinct_fraction"].measure(View("加微信领红包送礼" * 1000)) < 0.02


def test_eight_different_sentences_are_no_repetition():
    text = "".join(f"本合同约定{one}应当在收到货物之后的十日之内向{other}支付全部的货款和运输费用。\n" for one, other in
                   (("甲方", "乙方"), ("乙方", "甲方"))) + "".join(
        f"患者服用此药以后血压由一百六十毫米汞柱{way}到一百{end}毫米汞柱，效果非常明显。\n" for way, end in
        (("降低", "二十"), ("升高", "八十"))) + "".join(
        f"{year}年3月5日，公司召开第{number}次董事会会议，审议通过了年度利润分配议案，全体董事出席了会议。\n"
        for year, number in ((2019, "十二"), (2020, "十三")))
    assert WEB.apply(text, None).failed == ()
    assert WEB.apply(text.split("\n")[0] * 12, None).failed != ()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["他走了。", "床前明月光，", "首页", "小路尽头的灯还亮着", "• 北豆腐一块切成厚片",
                                 "好。", "| 西安 | 陕西省 |", "", "====", "请开启 JavaScript", "1. 青椒两个洗净去籽",
                                 "山被薄雾遮住只露出淡淡的轮廓他想起年轻时在外地工作的日子"]),
                max_size=30).map("\n".join))
def test_lines_of_every_kind_come_to_rest(text):
    once, removed = drop_lines(View(text), tuple(LINE_RULES))
    assert drop_lines(View(once), tuple(LINE_RULES)) == (once, {})
    assert once.count("他走了。") == text.count("他走了。") and (once == text) == (not removed)
