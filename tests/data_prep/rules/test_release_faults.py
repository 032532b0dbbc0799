"""What CT-LLM's released filter does wrong, and this one does not: one test for each fault."""

import pytest

from ctllm_jax.config.prepare import FilterConfig
from data_prep.rules import RULES, SETS, Filter
from data_prep.rules.blacklist import Blacklist, load
from data_prep.rules.normalize import normalize_punctuation
from data_prep.rules.repetition import covered, repetition
from data_prep.rules.view import View

REPEATED = [name for name in RULES if name.startswith(("top_", "repeated_"))]
GOOD = ("清晨，老人沿着河边慢慢散步，看见几只白鹭落在浅水里觅食。远处的山被薄雾遮住，只露出淡淡的轮廓。\n"
        "他想起年轻时在外地工作的日子，那时候每年只能回家一次。如今孩子们都长大了，村里也修好了公路。\n"
        "“您又出来走走？”邻居笑着问道。老人点点头，说今天天气不错，正好去集市买些新鲜蔬菜和豆腐。\n")


def statistics(rule_set="web", **changes):
    return Filter(rule_set, FilterConfig(mode="statistics", **changes))


@pytest.mark.parametrize("name", REPEATED)
def test_d_rules_drop_repetition(name):
    # The release asks whether a tuple is true, which it always is.
    spam = "加微信领红包送礼" * 20
    assert name in statistics().apply(spam, None).failed
    assert name not in statistics().apply(GOOD, None).failed


def test_d4_to_d9_count_covered_positions_not_distinct_characters():
    # 60 positions are covered by repeated 5-grams, of only five distinct characters.
    text = "甲乙丙丁戊" * 12 + "".join(chr(0x4F00 + number) for number in range(40))
    assert RULES["repeated_5gram_fraction"].measure(View(text, published=True)) == 0.6
    assert RULES["repeated_5gram_fraction"].measure(View(text)) == 0.55
    assert covered(repetition(View("甲乙丙丁戊" * 2).codes).places_of(5), 5) == 10


def test_w_rules_are_called():
    text = GOOD + "首页 登录 注册\n请开启 JavaScript 后重试。\n好。\nLorem ipsum dolor sit amet.\n"
    outcome = statistics().apply(text, None)
    assert outcome.text.strip() == GOOD.strip()
    assert outcome.removed == {"lines_terminal_punctuation": 1, "lines_javascript": 1, "lines_three_words": 1,
                               "lines_lorem_ipsum": 1}


def test_domains_are_read_as_well_as_urls(tmp_path):
    (tmp_path / "ads").mkdir()
    (tmp_path / "ads" / "domains").write_text("bad.com\n")
    (tmp_path / "ads" / "urls").write_text("half.com/bad\n")
    blacklist = load([str(tmp_path)])
    assert blacklist.hit("http://bad.com/") and blacklist.hit("http://half.com/bad/1")
    assert not blacklist.hit("http://half.com/good")


def test_a_blocked_url_ends_at_a_boundary():
    blacklist = Blacklist.of(["b.com"], ["a.com/x"])
    assert blacklist.hit("http://a.com/x") and blacklist.hit("http://a.com/x/y") and blacklist.hit("http://c.b.com")
    assert not blacklist.hit("http://a.com/xyz") and not blacklist.hit("http://ab.com")


def test_the_language_label_is_looked_at():
    # Confident English has a score over 0.4: the score alone lets it through.
    english = ("The old man walked slowly along the river and watched the birds in the shallow water. "
               "He remembered the years when he worked far away from home.") * 2
    outcome = statistics().apply(english, None)
    assert outcome.language == "en" and outcome.values["language_score"] > 0.9
    assert "language" in outcome.failed and "language_score" not in outcome.failed


def test_language_is_identified_on_the_raw_text(monkeypatch):
    seen = []
    chosen = statistics()
    monkeypatch.setattr(chosen, "_identify", lambda text: seen.append(text) or ("zh", 0.9))
    text = GOOD + "请看 http://a.com 。"
    outcome = chosen.apply(text, None)
    assert seen == [text] and seen[0] != normalize_punctuation(text)
    assert (outcome.language, outcome.score) == ("zh", 0.9)


def test_three_chinese_full_stops_are_a_teaser():
    # U2 makes them three ASCII full stops, which the release's pattern does not know.
    assert RULES["more_line_fraction"].measure(View("今天天气不错。。。\n明天再说。")) == 0.5


def test_good_prose_passes_every_rule():
    # Good prose passes: in the release 10.3 % of good Chinese fails the language score after U2.
    assert statistics().apply(GOOD, None).failed == ()
    assert SETS["web"].languages == ("zh",)
