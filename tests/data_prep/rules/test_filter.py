"""The filter as a whole: modes, order, what is written, rule sets, thresholds, explain."""

import dataclasses
import hashlib
import json
import pickle
import sys

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.prepare import RULE_SETS, FilterConfig, RuleBounds
from data_prep.rules import (
    EMPTY,
    RULES,
    SETS,
    Bounds,
    Filter,
    explain,
    language,
    normalize,
    registry,
    sets,
    view,
    with_thresholds,
)
from data_prep.rules.lines import LINE_RULES
from tests.data_prep.rules.test_release_faults import GOOD, statistics

SPAM = "加微信领红包送礼" * 20


def test_production_stops_at_the_first_rule_that_fails():
    every, first = statistics().apply(SPAM, None), Filter("web", FilterConfig()).apply(SPAM, None)
    assert len(every.failed) > 3 and set(every.values) == set(SETS["web"].bounds)
    assert first.failed == every.failed[:1]
    assert list(first.values) == list(every.values)[:len(first.values)] and list(first.values)[-1] == first.failed[0]


def test_both_modes_agree_on_what_is_kept_and_written():
    for text in (GOOD, SPAM, "", GOOD + "首页\n" * 3, GOOD * 200):
        every, first = statistics().apply(text, None), Filter("web", FilterConfig()).apply(text, None)
        assert bool(every.failed) == bool(first.failed)
        if not every.failed:
            assert every == first


def test_rules_come_cheap_ones_first():
    for rule_set in SETS.values():
        costs = [RULES[name].cost for name in rule_set.bounds]
        assert costs == sorted(costs)


@pytest.mark.parametrize("text", ["", " \n ", "http://a.com", "首页\n登录\n"])
@pytest.mark.parametrize("rule_set", ["web", "none"])
def test_nothing_left_is_a_failure(text, rule_set):
    failed = statistics(rule_set).apply(text, None).failed
    assert (EMPTY in failed) is (rule_set == "web" or not text.strip())


def test_too_little_left_by_the_line_rules_is_a_failure():
    menu = "首页登录注册帮助中心联系我们\n" * 30 + "今天天气不错，我们去散步。"
    outcome = statistics(thresholds={"web": {"sentences": RuleBounds(enabled=False)}}).apply(menu, None)
    assert EMPTY in outcome.failed and "length" not in outcome.failed


def test_punctuation_is_written_as_ascii_only_where_it_is_wanted():
    assert statistics().apply(GOOD, None).text == GOOD
    written = statistics(write_punctuation=True).apply(GOOD, None).text
    assert written.startswith("清晨,老人") and "。" not in written


def test_traditional_characters_are_simplified_where_it_is_wanted():
    text = GOOD.replace("远处", "遠處").replace("长大", "長大")
    assert statistics(simplify=True).apply(text, None).text == GOOD
    assert statistics().apply(text, None).text == text


def test_lone_surrogates_are_replaced_and_counted():
    outcome = statistics().apply(GOOD + "\ud800\n", None)
    assert outcome.removed["surrogates"] == 1 and "\ufffd" not in GOOD
    outcome.text.encode("utf-8")


def test_links_are_removed_before_the_rules_measure():
    with_link = GOOD.replace("豆腐", "豆腐https://a.com/" + "x" * 9000)
    outcome = statistics().apply(with_link, None)
    assert outcome.text == GOOD and outcome.removed == {"links": 1} and outcome.failed == ()
    assert outcome.values["length"] == statistics().apply(GOOD, None).values["length"]


def test_a_source_may_keep_other_languages():
    english = "The river is wide, and the man who lives beside it has a boat. He does not use it often. " * 2
    assert "language" in statistics().apply(english, None).failed
    for languages in (["en", "zh"], []):
        chosen = Filter("web", FilterConfig(mode="statistics"), languages=languages)
        assert "language" not in chosen.apply(english, None).failed


def test_a_source_s_languages_count_also_where_its_set_asks_for_none():
    assert "language" not in SETS["light"].bounds
    chosen = Filter("light", FilterConfig(), languages=["zh"])
    assert chosen.apply("The weather is fine, and we walk in the park.", None).failed == ("language",)
    outcome = chosen.apply(GOOD, None)
    assert outcome.failed == () and outcome.language == "zh" and "language" not in chosen.rule_set.left_out


@pytest.mark.parametrize(("package", "use"), [
    ("rjieba", lambda: view._cut.__wrapped__()), ("opencc", lambda: normalize._converter.__wrapped__()),
    ("fasttext", lambda: language.load.__wrapped__(None)),
])
def test_a_package_that_is_not_there_is_named(monkeypatch, package, use):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"needs? the package .*pip install 'ctllm-jax\[prep\]'"):
        use()


def test_a_filter_travels_to_another_process():
    chosen = Filter("web", FilterConfig(), languages=["zh", "ja"])
    again = pickle.loads(pickle.dumps(chosen))
    assert again.rule_set.languages == ("zh", "ja") and again.apply(GOOD, None) == chosen.apply(GOOD, None)


def test_sets_are_those_of_the_schema_and_name_real_rules():
    assert tuple(SETS) == RULE_SETS
    for rule_set in SETS.values():
        lines = {f"line:{name}" for name in LINE_RULES}
        assert set(rule_set.bounds) | set(rule_set.left_out) == set(RULES) | {
            f"line:{name}" for name in LINE_RULES if name not in rule_set.line_rules}
        assert not set(rule_set.bounds) & set(rule_set.left_out)
        assert all(rule_set.left_out.values()) and set(rule_set.line_rules) <= {line[5:] for line in lines}


def content_of(rule_set):
    """What a set asks for, as JSON text: a change of a set changes the corpus of everyone who prepares with it."""
    bounds = {name: [str(found.low), str(found.high), found.above] for name, found in rule_set.bounds.items()}
    left_out = sorted(rule_set.left_out.items())
    return json.dumps([bounds, left_out, rule_set.link_removal, rule_set.line_rules, rule_set.similar_lines,
                       rule_set.languages, rule_set.published], ensure_ascii=False)


@pytest.mark.parametrize(("name", "digest"), [
    ("web", "cd1361adf203b6d7"), ("map_cc", "4a469da9019b267c"), ("book", "2f887479916c3fef"),
    ("paper", "bc9ae009e7388fec"), ("encyclopedia", "61ce9b5d05edecdf"), ("code", "abd8bb1edc868ab3"),
    ("english", "0e749d0d7afd7308"), ("light", "dc7065eaad5b684e"), ("none", "ce85b267cb1b5233")])
def test_a_set_changes_only_on_purpose(name, digest):
    content = content_of(SETS[name])
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == digest, f"{name} now is {content}"


@pytest.mark.parametrize(("language", "domain", "code"), [("zh", "prose", "S99"), ("any", "any", "E9"),
                                                          ("en", "prose", "G99")])
def test_a_new_rule_joins_no_set(monkeypatch, language, domain, code):
    monkeypatch.setattr(registry, "RULES", registry.RULES.copy())
    monkeypatch.setattr(sets, "RULES", registry.RULES)
    registry.rule("shouting", code, high=0.1, cost=1, language=language, domain=domain)(lambda view: 0.0)
    for rule_set in sets._all():
        left_out = dict(rule_set.left_out)
        assert left_out.pop("shouting")
        assert dataclasses.replace(rule_set, left_out=left_out) == SETS[rule_set.name], rule_set.name


@pytest.mark.parametrize("name", ["web", "map_cc"])
def test_web_has_the_bounds_of_the_table(name):
    web = SETS[name].bounds
    assert (web["length"].low, web["length"].high) == (50, 10_000)
    assert not web["sentences"].keeps(1) and web["sentences"].keeps(2)
    assert not web["distinct_fraction"].keeps(0.1) and not web["punctuation_fraction"].keeps(0)
    assert [web[f"top_{n}gram_fraction"].high for n in (2, 3, 4)] == [0.20, 0.18, 0.16]
    assert {web[f"repeated_{n}gram_fraction"].high for n in range(5, 11)} == {0.60}
    assert "duplicate_sentence_fraction" in SETS["web"].left_out


def test_long_books_and_short_reviews_are_not_lost():
    # 90,000 characters, of which no passage is repeated.
    book = "".join("，。"[number % 13 == 0] if number % 7 == 6 else chr(0x4E00 + number * number * 31 % 9001)
                   for number in range(90_000))
    failed = statistics("book").apply(book, None).failed
    assert "length" not in failed and "distinct_fraction" not in failed
    for review in ("很好", "物流很快，包装不错！", "一般般吧。", "质量好 下次再来", "差评", "100分"):
        assert statistics("light").apply(review, None).failed == ()


def test_code_is_asked_for_no_prose():
    code = "def main():\n    for x in range(10):\n        print(x)  # see http://a.com\n" * 5
    outcome = statistics("code").apply(code, None)
    assert outcome.failed == () and outcome.text == code and outcome.removed == {}


def test_english_prose_passes_its_set():
    english = ("The old man walked slowly along the river and watched the birds that had come to the shallow water. "
               "He remembered the years when he worked far away from home, and could return to his village only once.\n"
               "Now the children have grown, and a road is there with trees at its side. \"You are out again,\" "
               "said a neighbor, and laughed. He nodded, because it was a good day to buy fresh food at the market.\n")
    assert statistics("english").apply(english, None).failed == ()
    assert statistics("english").apply(GOOD, None).failed != ()
    assert "english_repeated_10gram_fraction" in statistics("english").apply(english * 3, None).failed


def test_thresholds_change_one_set():
    chosen = with_thresholds(SETS, {"web": {"length": RuleBounds(low=20), "entropy": RuleBounds(enabled=False),
                                            "duplicate_sentence_fraction": RuleBounds(high=0.5),
                                            "sentences": RuleBounds(low=1), "three_words": RuleBounds(enabled=False)}})
    web = chosen["web"]
    assert web.bounds["length"] == Bounds(20, 10_000) and web.bounds["sentences"].keeps(1)
    assert "entropy" not in web.bounds and web.left_out["entropy"] == "switched off in the config"
    assert web.bounds["duplicate_sentence_fraction"].high == 0.5
    assert "three_words" not in web.line_rules and chosen["book"] == SETS["book"]
    assert SETS["web"].bounds["length"].low == 50


@pytest.mark.parametrize(("thresholds", "message"), [
    ({"wep": {}}, "'wep' does not exist; nearest: web"),
    ({"web": {"lenght": RuleBounds()}}, "'lenght' does not exist; nearest: length"),
    ({"web": {"javascript": RuleBounds(high=1)}}, "no low and high"),
])
def test_wrong_thresholds_are_refused(thresholds, message):
    with pytest.raises(UserError, match=message):
        with_thresholds(SETS, thresholds)
    with pytest.raises(UserError, match="nearest: web"):
        Filter("wbe", FilterConfig())


def test_explain_shows_every_rule_also_in_production():
    rows = {row[0]: row for row in explain(SPAM, None, Filter("web", FilterConfig()))}
    assert set(rows) == {*SETS["web"].bounds, *SETS["web"].line_rules, EMPTY}
    name, code, value, low, high, kept, doc = rows["top_2gram_fraction"]
    assert code == "D1" and high == 0.20 and value == 19 * 2 / 160 and not kept and "most frequent" in doc
    assert rows["sentences"][6].startswith("Kept above 1. ") and not rows["sentences"][5]
    assert rows["length"][2] == len(SPAM) and rows["length"][5]
    assert all(row[6] for row in rows.values())
