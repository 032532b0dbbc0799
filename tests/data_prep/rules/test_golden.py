"""Each rule on both sides of its bound, in the set that CT-LLM's table is: documents made for it, by hand."""

import math

import pytest

from data_prep.rules import RULES, SETS
from data_prep.rules.lines import LINE_RULES
from data_prep.rules.links import remove_links
from data_prep.rules.normalize import normalize_punctuation
from data_prep.rules.view import View

# 1,000 different Chinese characters: nothing in it is repeated, whatever is cut from it.
VARIED = "".join(chr(0x4E00 + 7 * number) for number in range(1000))


def cycle(distinct, length):
    """`length` characters, of which the first `distinct` ones of VARIED come again and again."""
    return (VARIED[:distinct] * (length // distinct + 1))[:length]


def with_gram(gram, times, length):
    """A text of `length` characters in which `gram` stands `times` times, evenly spread."""
    text, step = VARIED[:length], length // times
    for number in range(times):
        text = text[:step * number] + gram + text[step * number + len(gram):]
    return text


def repeated_share(size, share, length):
    """A text of `length` characters in which `size` characters come again, with others between, for a `share` of it."""
    again = round(length * share) // size
    text = "".join(VARIED[:size] + chr(0x3400 + number) for number in range(again + 1))
    return text + VARIED[500:500 + length - len(text)]


# rule, a document that is kept, its value, one that is not, its value
GOLDEN = [
    ("bracket_fraction", "【一】" + VARIED[:7], 0.1, "【一二】" + VARIED[:7], 2 / 11),
    ("sentences", "今天。明天", 2, "今天明天。", 1),
    ("length", VARIED[:50], 50, VARIED[:49] + " \n\u3000", 49),
    ("length", VARIED * 10, 10_000, VARIED * 10 + "一", 10_001),
    ("word_length", "我们今天去公园散步", 9 / 5, "我你他她它，我你他她它", 1.0),
    ("hash_fraction", VARIED[:9] + "#", 0.1, VARIED[:8] + "#", 1 / 9),
    ("ellipsis_fraction", VARIED[:8] + "..", 0.1, VARIED[:7] + "..", 1 / 9),
    ("ellipsis_fraction", VARIED[:14] + "……", 1 / 20, "一……二……", 2 / 14),
    ("digit_fraction", VARIED[:7] + "123，", 0.3, VARIED[:7] + "１２３４", 4 / 11),
    ("more_line_fraction", "一\n二\n三\n四展开", 0.25, "一\n二更多\n三", 1 / 3),
    ("more_line_fraction", "一\n二\n三\n四。。。", 0.25, "一\n二Read More\n三。。。", 2 / 3),
    ("bullet_line_fraction", "• 一\n" * 9 + "二", 0.9, "• 一\n" * 9 + "– 二", 1.0),
    ("punctuation_fraction", VARIED[:99] + "。", 0.01, VARIED[:99], 0.0),
    ("punctuation_fraction", VARIED[:50] + "\n" + VARIED[50:100], 0.01, VARIED[:50] + "\n", 0.0),
    ("sentences", "今天\n明天", 2, "今天\n", 1),
    ("bullet_line_fraction", "• 一二三四五\n" * 20, 0.0, "• 一二三四\n" * 20, 1.0),
    ("replacement_fraction", VARIED[:99] + "\ufffd", 0.01, VARIED[:98] + "\ufffd\ufffd", 0.02),
    ("replacement_fraction", "\ue000" + VARIED[:99] + "\ue000。", 0.0, VARIED[:50] + "\ue000" + VARIED[50:60], 1 / 60),
    ("question_mark_fraction", VARIED[:85] + "？" * 15, 0.15, VARIED[:84] + "?" * 16, 0.16),
    ("mojibake_fraction", VARIED[:400], 0.0, VARIED[:97] + "锟斤拷", 0.03),
    ("escape_fraction", VARIED[:90] + "&nbsp;甲乙丙丁", 0.06, VARIED[:60] + r"\u4f60\u597d", 12 / 72),
    ("distinct_fraction", cycle(101, 1000), 0.101, cycle(100, 1000), 0.1),
    ("distinct_fraction", cycle(101, 9000), 0.101, cycle(100, 9000), 0.1),
    ("entropy", cycle(21, 21 * 40), math.log(21), cycle(20, 20 * 40), math.log(20)),
    ("top_2gram_fraction", with_gram("甲乙", 11, 100), 0.20, with_gram("甲乙", 12, 100), 0.22),
    ("top_3gram_fraction", with_gram("甲乙丙", 7, 100), 0.18, with_gram("甲乙丙", 8, 100), 0.21),
    ("top_4gram_fraction", with_gram("甲乙丙丁", 2, 25), 0.16, with_gram("甲乙丙丁", 2, 24), 4 / 24),
    *((f"repeated_{n}gram_fraction", repeated_share(n, 0.6, 20 * n), 0.6, repeated_share(n, 0.65, 20 * n), 0.65)
      for n in range(5, 11)),
    ("duplicate_sentence_fraction", "一。二。三。一", 0.25, "一。二。一", 1 / 3),
    ("duplicate_sentence_character_fraction", "一二三四。五。五", 1 / 6, "一。二二。二二", 2 / 5),
]


@pytest.mark.parametrize(("name", "kept", "kept_value", "dropped", "dropped_value"), GOLDEN)
def test_a_document_on_each_side_of_the_bound(name, kept, kept_value, dropped, dropped_value):
    bounds = SETS["web"].bounds.get(name, RULES[name].default)
    for text, value, stays in ((kept, kept_value, True), (dropped, dropped_value, False)):
        measured = RULES[name].measure(View(text))
        assert measured == pytest.approx(value)
        assert bounds.keeps(measured) is stays


ENGLISH = ("the be to of and that have with a model reads text quickly and does not stop before it has read all of it "
           "because a reader who stops in the middle knows only half of what there was to know about models").split()
ENGLISH_GOLDEN = [
    ("english_words", "a " * 50, 50, "a " * 49, 49),
    ("english_word_length", "abc abc", 3, "abc ab", 2.5),
    ("english_word_length", "a" * 10, 10, "a" * 11, 11),
    ("english_symbol_fraction", "# " + "a " * 9, 0.1, "# " + "a " * 8, 1 / 9),
    ("english_symbol_fraction", "a… " + "a " * 9, 0.1, "a... " + "a " * 8, 1 / 9),
    ("english_alphabetic_fraction", "a b c d 1", 0.8, "a b c 1 2", 0.6),
    ("english_stop_words", "The cat and dog", 2, "the cat the dog", 1),
    ("english_ellipsis_line_fraction", "a\nb\nc\nd…", 0.25, "a\nb...\nc", 1 / 3),
    ("duplicate_line_fraction", "a\nb\nc\na", 0.25, "a\nb\na", 1 / 3),
    ("duplicate_line_character_fraction", "abcd\ne\ne", 1 / 6, "a\nbb\nbb", 2 / 5),
    ("english_top_2gram_fraction", "a b c d e f g h i j k l m n o p a b q r", 0.2, "a b c d e f g h i a b", 4 / 11),
    ("english_top_3gram_fraction", " ".join("abcdefghijklmnopqrstuvwxyzABCDEFabc"), 6 / 35, "a b c d a b c", 6 / 7),
    ("english_top_4gram_fraction", " ".join(ENGLISH), 0.0, "a b c d e a b c d", 8 / 9),
    ("english_repeated_5gram_fraction", " ".join(ENGLISH), 0.0, "a b c d e f a b c d e", 5 / 11),
    ("english_repeated_10gram_fraction", "a b c d e f a b c d e", 0.0, " ".join(ENGLISH[:10] * 2), 0.5),
]


@pytest.mark.parametrize(("name", "kept", "kept_value", "dropped", "dropped_value"), ENGLISH_GOLDEN)
def test_an_english_document_on_each_side_of_the_bound(name, kept, kept_value, dropped, dropped_value):
    bounds = SETS["english"].bounds[name]
    for text, value, stays in ((kept, kept_value, True), (dropped, dropped_value, False)):
        assert RULES[name].measure(View(text)) == pytest.approx(value)
        assert bounds.keeps(value) is stays


def test_every_rule_has_a_golden_document():
    shown = {row[0] for row in GOLDEN + ENGLISH_GOLDEN}
    several = {name for name in RULES if name.startswith("english_repeated")}
    assert set(RULES) - shown - several == {"url_blacklist", "language", "language_score"}


@pytest.mark.parametrize(("name", "kept", "dropped"), [
    ("terminal_punctuation", "今天天气不错。", "今天天气不错"),
    ("terminal_punctuation", "他说：“走吧！”", "他说："),
    ("terminal_punctuation", "（见第三章。）", "（见第三章）"),
    ("terminal_punctuation", "Is it so?", "Home | About | Contact"),
    ("terminal_punctuation", "「知らない」", "知らない、"),
    ("javascript", "Java 是一种语言。", "请开启 JavaScript 后刷新。"),
    ("three_words", "好的呀。", "好的。"),
    ("three_words", "Please contact us.", "Contact us."),
    ("terminal_punctuation", "他走了。[1][2]", "他走了[1]"),
    ("terminal_punctuation", "他走了。（图）", "他走了（图）"),
    ("terminal_punctuation", "他走了。（责任编辑：张三）", "责任编辑：张三"),
    ("terminal_punctuation", "他走了！😀👍🏽", "他走了😀"),
    ("terminal_punctuation", "“他走了。’❞", "他走了’"),
    ("terminal_punctuation", "他走了。\u200b\ufeff\u2060\xad\x00\ue000", "他走了\u200b"),
    ("three_words", "我用 C。", "12。"),
    ("lorem_ipsum", "Lorem and ipsum.", "Lorem ipsum dolor."),
])
def test_a_line_on_each_side_of_its_rule(name, kept, dropped):
    assert LINE_RULES[name].keeps(View(kept).measured)
    assert not LINE_RULES[name].keeps(View(dropped).measured)


@pytest.mark.parametrize(("text", "left", "count"), [
    ("见https://a.com/b?c=d&e=1，谢谢", "见，谢谢", 1),
    ("见 http://例子.中国/路径 。", "见 http://例子.中国/路径 。", 0),
    ("(www.example.com/x).", "().", 1),
    ("主机 a.b.c.d 和 192.168.0.1:8080/x 都", "主机  和  都", 2),
    ("访问 example.com 或example.cn", "访问  或example.cn", 1),
    ("Go to a.com. Then stop.", "Go to . Then stop.", 1),
    ("写信给 me@example.com", "写信给 me@example.com", 0),
    ("main.py 与 3.14 和 e.g. 这样", "main.py 与 3.14 和 e.g. 这样", 0),
    ("句号.com 是什么", "句号.com 是什么", 0),
    ("ftp://x.y/z", "", 1),
    ("It ended.it was late. See ASP.NET now.", "It ended.it was late. See ASP.NET now.", 0),
])
def test_links_are_removed(text, left, count):
    assert remove_links(text) == (left, count)


@pytest.mark.parametrize(("text", "ascii_text"), [
    ("你好，世界。", "你好,世界."),
    ("“引”‘用’《书》【注】", '"引"\'用\'"书"[注]'),
    ("（一）、二；三：四？五！", "(一),二;三:四?五!"),
    ("——……～％", "--……~%"), ("１ａ", "１ａ"), ("ASCII stays.", "ASCII stays."),
])
def test_punctuation_becomes_ascii(text, ascii_text):
    assert normalize_punctuation(text) == ascii_text
