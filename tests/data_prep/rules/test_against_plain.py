"""Every rule against its plain version, over random text and text that looks real."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.rules import RULES, language
from data_prep.rules.blacklist import Blacklist
from data_prep.rules.lines import drop_lines
from data_prep.rules.view import SEGMENTED, View
from tests.data_prep.rules import plain

CHINESE = ("的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就"
           "分对成会可主发年动同工也能下过子说产种面而方后多定行学法所民得经")
MARKS = "。。，，，、；：？！…—“”‘’（）《》【】#.·•"
ENGLISH = ("the be to of and that have with a model reads text quickly, but (sometimes) it does not. 3.14 #tag ... "
           "e.g. C++").split()
ODD = "\u200b\ufeff\u3000\t ａＢ１２！ﬁ½①㎏ｶﾞが\u0301e\u0301각\u1100\u1161𠀀😀\U000e0001\r"


def real_looking(seed):
    """A text of Chinese, English, marks, blanks and odd characters, in which parts come again."""
    chance = random.Random(seed)
    alphabet = CHINESE[:chance.choice((3, 12, len(CHINESE)))]
    parts = []
    for _ in range(chance.randrange(1, 40)):
        kind = chance.random()
        if kind < 0.5:
            parts.append("".join(chance.choices(alphabet, k=chance.randrange(1, 25))))
        elif kind < 0.7:
            parts.append("".join(chance.choices(MARKS, k=chance.randrange(1, 4))))
        elif kind < 0.8:
            parts.append(" ".join(chance.choices(ENGLISH, k=chance.randrange(1, 12))) + chance.choice(" ."))
        elif kind < 0.85:
            parts.append("".join(chance.choices(ODD + "0123456789", k=chance.randrange(1, 6))))
        elif kind < 0.93:
            parts.append(chance.choice(("\n", "\n\n", "  \n", "展开\n", "read more\n", "。。。\n", "\n• ", "\n–")))
        elif parts:
            parts += parts[chance.randrange(len(parts)):][:chance.randrange(1, 12)]
    return "".join(parts)


TEXTS = [real_looking(seed) for seed in range(150)] + [
    "", " ", "\n", "好", "。", "aa", "ab" * 30, "一二三四五六七八九十" * 2, "……", "...", "#" * 40,
    "【】", "【【a】", "】a【b", "\u0301", "1" * 12, "a\rb", "e\u0301" * 9, "\ufdd0一二三四五\ufdd1六七八" * 3,
    "甲乙丙丁" * 9 + "\ufdd0\ufdd1\ufdd2", "\U0010ffff" * 8, "好" * 1500 + "。", "甲乙" + "=" * 80 + "甲乙。",
    "甲\n" + "─" * 30 + "\n乙\n* * *\n-=-\n" + "·" * 4 + "丙" + "·" * 5, "abab" * 30 + "cdcdcd甲" * 4,
    "甲ababababa乙" * 3, "目录" + "." * 12 + "1\n目录" + "." * 13 + "2",
    "好\u200b的\ufe0f。\u2060\x00\ue000呢?", "我\ue000们\ufffd？\ufffd",
    "你\ufffd？" * 3, "我们\ufffd？",
    "a a a a a b b b a a a"]
BY_VIEW = ("url_blacklist", "language", "language_score")
DECODED = ("mojibake_fraction", "escape_fraction")
"""Tested in test_damage.py, on text that is damaged there."""


def test_every_rule_has_a_plain_version():
    assert set(plain.RULES) == set(RULES) - {*BY_VIEW, *DECODED}
    assert plain.SEGMENTED == SEGMENTED


@pytest.mark.parametrize("name", sorted(plain.RULES))
def test_rule_equals_its_plain_version(name):
    for text in TEXTS:
        assert RULES[name].measure(View(text)) == pytest.approx(plain.RULES[name](text), abs=1e-12), repr(text)


@pytest.mark.parametrize("name", sorted(plain.RULES))
def test_rule_takes_more_than_one_value_here(name):
    # A comparison over texts on which a rule is constant would show nothing.
    assert len({plain.RULES[name](text) for text in TEXTS}) > 3


@settings(max_examples=60, deadline=None)
@given(st.text(st.one_of(st.characters(exclude_categories=["Cs"]),
                         st.sampled_from("的了。,. \n#1a【】…=-?\u200b\ufffd")), max_size=80))
def test_all_rules_equal_their_plain_versions_on_any_text(text):
    view = View(text)
    for name, slow in plain.RULES.items():
        assert RULES[name].measure(view) == pytest.approx(slow(text), abs=1e-12), name


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["甲", "乙", "甲乙", "甲甲甲", "乙甲乙", "甲乙丙丁戊", "a", "=", "a b a b ", "丙"]),
                max_size=40).map("".join), st.booleans())
def test_repetition_equals_its_plain_version_where_occurrences_overlap(text, published):
    view = View(text, published=published)
    for n in range(2, 11):
        slow = (plain.top_fraction if n < 5 else
                plain.repeated_fraction_as_published if published else plain.repeated_fraction)
        value = RULES[f"{'top' if n < 5 else 'repeated'}_{n}gram_fraction"].measure(view)
        assert 0 <= value <= 1
        if not (published and n < 5):  # Its plain version takes separators away.
            assert value == pytest.approx(slow(n, text), abs=1e-12), n


@pytest.mark.parametrize("seed", range(60))
def test_lines_go_as_in_the_plain_version(seed):
    text = real_looking(seed) + "\nUse JavaScript now, please.\n好。\n他说：“好的吧。”）\nLorem Ipsum dolor sit.\n"
    gone = plain.dropped_lines(text)
    names = ("terminal_punctuation", "javascript", "three_words", "lorem_ipsum")
    cleaned, removed = drop_lines(View(text, published=True), names)
    kept = [line for number, line in enumerate(text.split("\n")) if line.strip() and number not in gone]
    assert [line for line in cleaned.split("\n") if plain.measured(line, True).strip()] == \
        [line for line in kept if plain.measured(line, True).strip()]
    assert removed == {name: list(gone.values()).count(name) for name in set(gone.values())}


@pytest.mark.parametrize("seed", range(5))
def test_blacklist_equals_a_plain_one(seed):
    chance = random.Random(seed)
    hosts = [".".join(chance.choices(("a", "b", "co", "x1", "com"), k=chance.randrange(1, 5))) for _ in range(80)]
    paths = ["", "/", "/x", "/x/", "/x/y", "/xy", "/x?q=1", "/x?q=1&r=2", "/x#f"]
    domains = set(chance.sample(hosts, 3))
    prefixes = {(host + path).rstrip("/") for host, path in zip(chance.sample(hosts, 6), paths[1:7], strict=True)}
    blacklist = Blacklist.of(domains, prefixes)
    hits = 0
    for host in hosts:
        for path in paths:
            by_domain = any(host == domain or host.endswith("." + domain) for domain in domains)
            url = host + path
            by_url = any(url == prefix or url.startswith(prefix) and url[len(prefix)] in "/?#&" for prefix in prefixes)
            assert blacklist.hit(f"https://www.{url}") == (by_domain or by_url), (url, domains, prefixes)
            hits += by_domain or by_url
    assert 0 < hits < len(hosts) * len(paths)


def test_language_equals_fasttext_itself_on_a_short_text():
    import fasttext

    model = fasttext.load_model(str(language.packaged()))
    text = "今天天气不错，我们去公园散步。"
    labels, scores = model.predict(text)
    assert language.load(None)(text) == (labels[0].removeprefix("__label__"), pytest.approx(scores[0]))
