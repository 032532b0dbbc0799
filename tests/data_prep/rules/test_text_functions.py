"""Text functions on any Unicode: they never raise, come to rest after one pass, and take linear time."""

import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ctllm_jax.config.prepare import FilterConfig
from data_prep.rules import RULES, SETS, Filter, normalize
from data_prep.rules.bad_words import BadWords
from data_prep.rules.blacklist import Blacklist, split_url
from data_prep.rules.lines import LINE_RULES, drop_lines
from data_prep.rules.links import remove_links
from data_prep.rules.view import View, segment

# Any code point, lone surrogates too, among the pieces that the functions look for.
PIECES = st.sampled_from(["http://", "https://a.cn/x", "www.", "a.com", ".", "com", "1.2.3.4", "@", "-", "/", "?", "。",
                          "…", "【", "】", "\n", "\r\n", " ", "展开", "javascript", "lorem ipsum", "坏词", "坏", "词",
                          "ass", "•", "\u0301", "\u3099", "\u1161", "\ud800", "\udc00", "\U0010ffff", "\x00"])
TEXTS = st.lists(st.one_of(PIECES, st.text(st.characters(), max_size=4)), max_size=25).map("".join)
WELL_FORMED = TEXTS.map(lambda text: normalize.without_surrogates(text)[0])
BAD = BadWords(["坏词", "ass"])
WEB = Filter("web", FilterConfig(mode="statistics"))
EXAMPLES = settings(max_examples=150, deadline=None)


@EXAMPLES
@given(TEXTS)
@example("\ud83d\ude00")
def test_surrogates_go_one_by_one(text):
    fixed, count = normalize.without_surrogates(text)
    fixed.encode("utf-8")
    assert len(fixed) == len(text) and count == sum("\ud800" <= character <= "\udfff" for character in text)
    assert normalize.without_surrogates(fixed) == (fixed, 0)


@EXAMPLES
@given(TEXTS)
def test_punctuation_comes_to_rest_and_keeps_its_length(text):
    once = normalize.normalize_punctuation(text)
    assert len(once) == len(text) and normalize.normalize_punctuation(once) == once


@EXAMPLES
@given(TEXTS)
@example("e\u0301…각\u11a8 ㎏")
def test_measured_text_is_that_of_unicodedata(text):
    expected = normalize.normalize_punctuation(unicodedata.normalize("NFKC", text))
    assert normalize.from_code_points(normalize.measured_code_points(text)) == expected


def test_measured_text_of_every_character_alone_and_between_others():
    for start in range(0, 0x110000, 0x1000):
        for text in ("".join(map(chr, range(start, start + 0x1000))), "a".join(map(chr, range(start, start + 0x1000)))):
            expected = normalize.normalize_punctuation(unicodedata.normalize("NFKC", text))
            assert normalize.from_code_points(normalize.measured_code_points(text)) == expected, hex(start)


@EXAMPLES
@given(TEXTS)
@example("wwwww.a.com")
@example("a.comhttp://b.cn.com")
def test_links_come_to_rest(text):
    once, count = remove_links(text)
    assert remove_links(once) == (once, 0), once
    assert (count == 0) == (once == text)


@EXAMPLES
@given(WELL_FORMED)
def test_lines_come_to_rest(text):
    once, removed = drop_lines(View(text), tuple(LINE_RULES), BAD)
    assert drop_lines(View(once), tuple(LINE_RULES), BAD) == (once, {})
    assert (once == text) == (not removed)
    assert all(count > 0 for count in removed.values())


@EXAMPLES
@given(WELL_FORMED)
def test_simplifying_changes_no_other_character(text):
    simplified = normalize.simplify(text + "漢")
    assert simplified.endswith("汉") and len(simplified) == len(text) + 1
    assert [character for character in simplified if character < "\u3400"] == \
        [character for character in text if character < "\u3400"]


@EXAMPLES
@given(WELL_FORMED)
def test_segments_leave_no_gap(text):
    assert "".join(segment(text)) == text


@EXAMPLES
@given(TEXTS)
def test_no_url_raises(url):
    host, rest = split_url(url)
    assert host == host.lower() and not set(host) & set("/?#")
    assert Blacklist.of(["b.com"], ["a.com/x"]).hit(url) in (True, False)


@settings(max_examples=80, deadline=None)
@given(TEXTS)
def test_filter_measures_any_text(text):
    outcome = WEB.apply(text, text[:20])
    assert set(outcome.values) == set(SETS["web"].bounds)
    assert all(np.isfinite(value) and value >= 0 for value in outcome.values.values())
    outcome.text.encode("utf-8")
    assert outcome.failed or outcome.text.strip()


@pytest.mark.parametrize("text", ["好" * 10**6, "。" * 10**6, "a" * 10**6, "a." * 500_000, "\n" * 10**6,
                                  "【" * 10**6, "www." * 250_000, "http://" * 140_000, "a-" * 500_000, "#\n" * 500_000,
                                  "坏词" * 300_000, "1.2.3." * 160_000, "e\u0301" * 300_000, "x 坏词坏 " * 150_000,
                                  "好。\n" * 300_000],
                         ids=lambda text: ascii(text[:4]))
@pytest.mark.timeout(60)
def test_a_long_monotonous_document_takes_no_quadratic_time(text):
    # A quadratic pass over 10^6 characters takes minutes; all of these take some seconds.
    outcome = WEB.apply(text, "http://a.com/" + text)
    assert len(outcome.values) == len(SETS["web"].bounds)
    drop_lines(View(text), ("bad_words",), BAD)


def test_values_do_not_depend_on_the_order_of_the_rules():
    text = "今天天气不错，我们去公园散步。\n• 明天再说…… 12#" * 3
    for name in RULES:
        if name not in ("language", "language_score", "url_blacklist"):
            forward, view = RULES[name].measure(View(text)), View(text)
            for other in reversed(RULES):
                RULES[other].measure(view)
            assert RULES[name].measure(view) == forward
