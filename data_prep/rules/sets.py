"""Rule sets: the rules for each kind of text with their bounds, and the reasons for leaving others out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ctllm_jax.config.errors import UserError, unknown
from data_prep.rules import (  # noqa: F401  (they register)
    characters,
    damage,
    english,
    language,
    lines,
    ngrams,
    sentences,
    urls,
)
from data_prep.rules.lines import LINE_RULES
from data_prep.rules.registry import RULES, Bounds, Rule

if TYPE_CHECKING:
    from ctllm_jax.config.prepare import RuleBounds


@dataclass(frozen=True)
class RuleSet:
    """The rules for one kind of text.

    `bounds`: rule -> values that are kept, cheap rules first; `line_rules`: names of `LINE_RULES`; `similar_lines`:
    whether the later of two similar lines of a document goes; `languages`: labels that are kept (none: any);
    `left_out`: rule -> why it is not asked; `published`: the rules measure as CT-LLM describes them (`View`).
    """

    name: str
    bounds: Mapping[str, Bounds]
    link_removal: bool = False
    line_rules: tuple[str, ...] = ()
    similar_lines: bool = False
    languages: tuple[str, ...] = ()
    published: bool = False
    left_out: Mapping[str, str] = field(default_factory=dict)


# A set asks for the rules that it lists, and for no other: a new rule joins none by itself.
_DAMAGE = ("replacement_fraction", "question_mark_fraction", "mojibake_fraction", "escape_fraction")
_STATISTICS = ("more_line_fraction", "bullet_line_fraction", "bracket_fraction", "length", "word_length",
               "hash_fraction", "ellipsis_fraction", "digit_fraction", "punctuation_fraction", "distinct_fraction",
               "entropy", "sentences")
_LANGUAGE = ("language_score", "language")
_TOP = ("top_2gram_fraction", "top_3gram_fraction", "top_4gram_fraction")
_SHORT_REPEATED = ("repeated_5gram_fraction", "repeated_6gram_fraction")
_REPEATED = ("repeated_7gram_fraction", "repeated_8gram_fraction", "repeated_9gram_fraction",
             "repeated_10gram_fraction")
_LONG_TEXT = (*_LANGUAGE, *_STATISTICS, *_DAMAGE, *_TOP, *_REPEATED)
_ENGLISH = ("english_words", "english_word_length", "english_symbol_fraction", "english_alphabetic_fraction",
            "english_stop_words", "english_ellipsis_line_fraction", "duplicate_line_fraction",
            "duplicate_line_character_fraction", "english_top_2gram_fraction", "english_top_3gram_fraction",
            "english_top_4gram_fraction", "english_repeated_5gram_fraction", "english_repeated_6gram_fraction",
            "english_repeated_7gram_fraction", "english_repeated_8gram_fraction", "english_repeated_9gram_fraction",
            "english_repeated_10gram_fraction")
_PROSE_LINES = ("javascript", "lorem_ipsum", "bad_words")
_OF_ANOTHER_LANGUAGE = {
    "en": "for English",
    "zh": "counts characters, as is right for Chinese; the rules for words stand in its place"}


def _rule_set(name: str, names: Sequence[str], left_out: Mapping[str, str], *,
              text: tuple[str, str] = ("zh", "prose"), changed: Mapping[str, Bounds] | None = None,
              why: str = "not listed", lines_why: str = "", **fields) -> RuleSet:
    """A set of the rules `names`.

    Args:
      left_out: rule -> why it is not asked. Any other rule that is not listed is for a text of another language or
        domain than `text`, or left out for `why`.
      changed: bounds that are not the rule's own.
      lines_why: why the line rules that the set lacks are left out.
    """
    def reason(rule: Rule) -> str:
        if rule.domain not in ("any", text[1]):
            return f"for {rule.domain}"
        return why if rule.language in ("any", text[0]) else _OF_ANOTHER_LANGUAGE[rule.language]

    bounds = {rule: RULES[rule].default for rule in names} | dict(changed or {})
    others = {rule: left_out.get(rule) or reason(found) for rule, found in RULES.items() if rule not in bounds}
    missing = {f"line:{rule}": lines_why for rule in LINE_RULES if rule not in fields.get("line_rules", ())}
    return RuleSet(name, _cheap_first(bounds), left_out=others | missing, **fields)


def _cheap_first(bounds: Mapping[str, Bounds]) -> dict[str, Bounds]:
    return {name: bounds[name] for name in sorted(bounds, key=lambda name: RULES[name].cost)}


def _all() -> list[RuleSet]:
    off = dict.fromkeys(("duplicate_sentence_fraction", "duplicate_sentence_character_fraction"),
                        "off in CT-LLM's release")
    long = off | dict.fromkeys(_SHORT_REPEATED, "rises with the length of a text, and these are long")
    no_maximum = {"length": Bounds(low=50)}
    published = ("url_blacklist", *_LANGUAGE, *_STATISTICS, *_TOP, *_SHORT_REPEATED, *_REPEATED)
    verse = "verse, headings and hard-wrapped lines end without a mark, and may be short"
    return [
        _rule_set("web", (*published, *_DAMAGE), off, link_removal=True, line_rules=tuple(LINE_RULES),
                  similar_lines=True, languages=("zh",)),
        _rule_set("map_cc", published, off | dict.fromkeys(_DAMAGE, "not among CT-LLM's rules"), link_removal=True,
                  line_rules=tuple(LINE_RULES), similar_lines=True, languages=("zh",), published=True),
        _rule_set("book", _LONG_TEXT, long | {"url_blacklist": "books have no URL"}, changed=no_maximum,
                  link_removal=True, line_rules=_PROSE_LINES, lines_why=verse, languages=("zh",)),
        _rule_set("paper", ("url_blacklist", *_LONG_TEXT), long, changed=no_maximum, link_removal=True,
                  line_rules=_PROSE_LINES, similar_lines=True, languages=("zh",),
                  lines_why="formulas, headings, tables and hard-wrapped lines end without a mark"),
        _rule_set("encyclopedia", ("url_blacklist", *_LONG_TEXT), long, changed=no_maximum, link_removal=True,
                  line_rules=_PROSE_LINES, lines_why="headings and lists end without a mark", similar_lines=True,
                  languages=("zh",)),
        _rule_set("code", ("url_blacklist", "length", "replacement_fraction", "mojibake_fraction"), {},
                  text=("any", "code"), changed={"length": Bounds(low=10)}, lines_why="for prose"),
        _rule_set("english", ("url_blacklist", *_LANGUAGE, *_ENGLISH, *_DAMAGE), {}, text=("en", "prose"),
                  link_removal=True, line_rules=tuple(LINE_RULES), similar_lines=True, languages=("en",)),
        _rule_set("light", ("url_blacklist", "length", "bracket_fraction", "hash_fraction", "replacement_fraction",
                            "mojibake_fraction", "repeated_10gram_fraction"), {},
                  why="a good text of another kind, short or not Chinese, fails it",
                  # Of English documentation 9 % have more than 0.6 of their characters in repeated 10-grams.
                  changed={"length": Bounds(low=1), "bracket_fraction": Bounds(high=0.5),
                           "replacement_fraction": Bounds(high=0.05), "repeated_10gram_fraction": Bounds(high=0.9)},
                  line_rules=("bad_words",), lines_why="a single line may be the whole text"),
        _rule_set("none", (), dict.fromkeys(RULES, "no rules"), lines_why="no rules"),
    ]


SETS = {rule_set.name: rule_set for rule_set in _all()}


def with_thresholds(sets: Mapping[str, RuleSet], thresholds: Mapping[str, Mapping[str, RuleBounds]]
                    ) -> dict[str, RuleSet]:
    """The sets with the bounds that a config changes; an unknown set or rule is a UserError with the nearest name.

    A given low or high is itself kept. A rule that the set leaves out comes in when it is named. A line rule can only
    be switched off and on.
    """
    changed = dict(sets)
    for set_name, rules in thresholds.items():
        if set_name not in sets:
            raise unknown("filter.thresholds: rule set", set_name, list(sets))
        for name, bounds in rules.items():
            known = [*RULES, *LINE_RULES]
            if name not in known:
                raise unknown(f"filter.thresholds.{set_name}: rule", name, known)
            change = _with_line_rule if name in LINE_RULES else _with_rule
            changed[set_name] = change(changed[set_name], name, bounds)
    return changed


def for_languages(rule_set: RuleSet, languages: Sequence[str]) -> RuleSet:
    """The set for a source that keeps these languages (none: any); it comes to look at the language if it did not."""
    if languages and "language" not in rule_set.bounds:
        bounds = _cheap_first({**rule_set.bounds, "language": RULES["language"].default})
        left_out = {name: why for name, why in rule_set.left_out.items() if name != "language"}
        rule_set = dataclasses.replace(rule_set, bounds=bounds, left_out=left_out)
    return dataclasses.replace(rule_set, languages=tuple(languages))


def _with_rule(rule_set: RuleSet, name: str, given: RuleBounds) -> RuleSet:
    bounds, left_out = dict(rule_set.bounds), dict(rule_set.left_out)
    if not given.enabled:
        bounds.pop(name, None)
        left_out[name] = "switched off in the config"
        return dataclasses.replace(rule_set, bounds=bounds, left_out=left_out)
    was = bounds.get(name, RULES[name].default)
    bounds[name] = Bounds(was.low if given.low is None else given.low, was.high if given.high is None else given.high,
                          was.above and given.low is None)
    left_out.pop(name, None)
    return dataclasses.replace(rule_set, bounds=_cheap_first(bounds), left_out=left_out)


def _with_line_rule(rule_set: RuleSet, name: str, given: RuleBounds) -> RuleSet:
    if given.low is not None or given.high is not None:
        raise UserError(f"filter.thresholds.{rule_set.name}.{name}: a rule for lines has no low and high; it is "
                        "switched on and off by enabled")
    chosen = {*rule_set.line_rules, name} if given.enabled else {*rule_set.line_rules} - {name}
    left_out = dict(rule_set.left_out)
    if given.enabled:
        left_out.pop(f"line:{name}", None)
    else:
        left_out[f"line:{name}"] = "switched off in the config"
    return dataclasses.replace(rule_set, line_rules=tuple(line for line in LINE_RULES if line in chosen),
                               left_out=left_out)
