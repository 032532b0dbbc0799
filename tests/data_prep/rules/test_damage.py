"""Text that is damaged in known ways fails the rule for it, and the same text before it was damaged does not."""

import random
import urllib.parse

import pytest

from ctllm_jax.config.prepare import FilterConfig
from data_prep.rules import RULES, SETS, Filter
from data_prep.rules.view import View
from tests.data_prep.rules.test_release_faults import GOOD

DAMAGE = [name for name, rule in RULES.items() if rule.code.startswith("E")]
TRADITIONAL = ("清晨，老人沿著河邊慢慢散步，看見幾隻白鷺落在淺水裡覓食。遠處的山被薄霧遮住，只露出淡淡的輪廓。"
               "他想起年輕時在外地工作的日子，那時候每年只能回家一次。如今孩子們都長大了，村裡也修好了公路。")
CLASSICAL = ("昔在帝尧，聪明文思，光宅天下。将逊于位，让于虞舜，作《尧典》。曰若稽古帝尧，曰放勋，"
             "钦、明、文、思、安安，允恭克让，光被四表，格于上下。克明俊德，以亲九族。九族既睦，平章百姓。"
             "百姓昭明，协和万邦。黎民于变时雍。")
ENGLISH = ("The old man walked slowly along the river – and watched the birds that “had come” to the shallow water; "
           "it’s a café’s naïve idea, he said. Is it so? 50 % of them left at 20 °C & more.")
FRENCH = ("Après l’été, les élèves français « étaient à l’école » où ça coûtait déjà 20 €, hélas ! Où êtes-vous ? "
          "Noël, cœur, œuvre.")


def spoiled(text, share, by):
    """The text with this share of its characters replaced."""
    draw = random.Random(0)
    return "".join(by if draw.random() < share else character for character in text)


def read_as(text, encoding, wrong, errors="replace"):
    return text.encode(encoding).decode(wrong, errors)


@pytest.mark.parametrize(("name", "text"), [
    ("replacement_fraction", spoiled(GOOD, 0.2, "\ufffd")),
    ("replacement_fraction", spoiled(GOOD, 0.05, "\ufffd")),
    ("replacement_fraction", spoiled(GOOD, 0.2, "\ue123")),
    ("replacement_fraction", GOOD.encode("gb18030").decode("utf-8", "replace")),
    ("question_mark_fraction", spoiled(GOOD, 0.33, "?")),
    ("question_mark_fraction", GOOD.encode("latin-1", "replace").decode()),
    ("mojibake_fraction", GOOD[:100] + "锟斤拷" * 5 + GOOD[100:]),
    ("mojibake_fraction", GOOD[:100] + "烫" * 12 + GOOD[100:]),
    ("mojibake_fraction", read_as(GOOD, "utf-8", "latin-1")),
    ("mojibake_fraction", read_as(GOOD, "utf-8", "cp1252", "ignore")),
    ("mojibake_fraction", read_as(GOOD, "utf-8", "gb18030")),
    ("mojibake_fraction", read_as(GOOD, "utf-8", "big5")),
    ("mojibake_fraction", read_as(GOOD, "utf-8", "cp932")),
    ("mojibake_fraction", read_as(GOOD, "gb18030", "latin-1")),
    ("mojibake_fraction", read_as(TRADITIONAL, "utf-8", "gb18030")),
    ("mojibake_fraction", read_as(ENGLISH * 2, "utf-8", "cp1252")),
    ("mojibake_fraction", read_as(FRENCH, "utf-8", "latin-1")),
    ("mojibake_fraction", GOOD + read_as(GOOD[:60], "utf-8", "gb18030")),
    ("escape_fraction", GOOD.encode("ascii", "backslashreplace").decode()),
    ("escape_fraction", GOOD.encode("ascii", "xmlcharrefreplace").decode()),
    ("escape_fraction", urllib.parse.quote(GOOD)),
    ("escape_fraction", urllib.parse.quote(GOOD).replace("%", "=")),
    ("escape_fraction", GOOD.replace("，", "&nbsp;&ldquo;")),
])
def test_damaged_text_fails_the_rule_that_says_so(name, text):
    view = View(text)
    assert RULES[name].default.high < RULES[name].measure(view) <= 1
    for rule_set in ("web", "book", "paper", "encyclopedia", "english"):
        assert name in Filter(rule_set, FilterConfig(mode="statistics")).apply(text, None).failed


@pytest.mark.parametrize("text", [GOOD, TRADITIONAL, CLASSICAL, ENGLISH, FRENCH, "", "好",
                                  "它叫“锟锟”，住在烫金的屯子里。" * 3,
                                  "Größe, Straße, Übung, Äpfel und Öl: für die Gäste.",
                                  "Crème brûlée à la carte, s’il vous plaît.",
                                  "東京都の天気は晴れです。明日も晴れるでしょう。",
                                  "오늘은 날씨가 좋습니다. 산책을 갑시다.",
                                  "\ue000 首页 \ue001 登录，\ue002更多内容请看这里。",
                                  "R&D 与 AT&T；a=b&c=d；100%；x = 3;"])
def test_clean_text_of_any_language_has_no_damage(text):
    view = View(text)
    for name in DAMAGE:
        assert RULES[name].default.keeps(RULES[name].measure(view)), name


def test_the_rules_are_on_in_every_set_for_prose_but_the_published_one():
    for name, rule_set in SETS.items():
        asked = set(DAMAGE) & set(rule_set.bounds)
        assert asked == (set() if name in ("map_cc", "none") else
                         {"replacement_fraction", "mojibake_fraction"} if name in ("code", "light") else set(DAMAGE))


@pytest.mark.timeout(60)
def test_long_damaged_text_takes_no_quadratic_time():
    for text in ("\ue000" * 200_000, "甲\ue000" * 100_000, "Ã©" * 100_000, "锟斤拷" * 60_000, "&" * 200_000,
                 "%E4" * 60_000, "😀" * 200_000, "(" * 200_000, "。" + ")" * 200_000, "浣犲" * 60_000):
        for name in DAMAGE:
            assert 0 <= RULES[name].measure(View(text)) <= 1
