"""Rule sets: which rules a kind of text has to keep, with which bounds, and why others are left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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
from data_prep.rules.registry import RULES, Bounds, unknown

if TYPE_CHECKING:
    from ctllm_jax.config.prepare import RuleBounds


@dataclass(frozen=True)
class RuleSet:
    """What is asked of one kind of text.

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


_OFF = "off in CT-LLM's release"
_ENGLISH = [name for name, found in RULES.items() if found.code.startswith("G")]
_CHINESE = [name for name in RULES if name not in _ENGLISH]
_REPEATED = [f"repeated_{n}gram_fraction" for n in range(5, 11)]
_DAMAGE = [name for name, found in RULES.items() if found.code.startswith("E")]
_DUPLICATES = dict.fromkeys(("duplicate_sentence_fraction", "duplicate_sentence_character_fraction"), _OFF)
_PROSE_LINES = ("javascript", "lorem_ipsum", "bad_words")


def _rule_set(name: str, names: Sequence[str], left_out: Mapping[str, str], *,
              changed: Mapping[str, Bounds] | None = None, lines_why: str = "", **fields) -> RuleSet:
    """A set of the rules `names` but for those left out; line rules that it lacks are left out for `lines_why`."""
    bounds = {rule: RULES[rule].default for rule in names if rule not in left_out} | dict(changed or {})
    missing = {f"line:{rule}": lines_why for rule in LINE_RULES if rule not in fields.get("line_rules", ())}
    return RuleSet(name, _cheap_first(bounds), left_out={**left_out, **missing}, **fields)


def _cheap_first(bounds: Mapping[str, Bounds]) -> dict[str, Bounds]:
    return {name: bounds[name] for name in sorted(bounds, key=lambda name: RULES[name].cost)}


def _all() -> list[RuleSet]:
    no_english = dict.fromkeys(_ENGLISH, "for English")
    no_maximum = {"length": Bounds(low=50)}
    long = dict.fromkeys(_REPEATED[:2], "rises with the length of a text, and these are long")
    for_code = ("url_blacklist", "length", "replacement_fraction", "mojibake_fraction")
    for_light = (*for_code, "bracket_fraction", "hash_fraction", _REPEATED[-1])
    for_english = ("url_blacklist", "language_score", "language", *_ENGLISH, *_DAMAGE)
    verse = "verse, headings and hard-wrapped lines end without a mark, and may be short"
    return [
        _rule_set("web", _CHINESE, no_english | _DUPLICATES, link_removal=True, line_rules=tuple(LINE_RULES),
                  similar_lines=True, languages=("zh",)),
        _rule_set("map_cc", _CHINESE, no_english | _DUPLICATES | dict.fromkeys(_DAMAGE, "not among CT-LLM's rules"),
                  link_removal=True, line_rules=tuple(LINE_RULES), similar_lines=True, languages=("zh",),
                  published=True),
        _rule_set("book", _CHINESE,
                  no_english | _DUPLICATES | long | {"url_blacklist": "books have no URL"},
                  changed=no_maximum, link_removal=True, line_rules=_PROSE_LINES, lines_why=verse, languages=("zh",)),
        _rule_set("paper", _CHINESE, no_english | _DUPLICATES | long, changed=no_maximum,
                  link_removal=True, line_rules=_PROSE_LINES,
                  lines_why="formulas, headings, tables and hard-wrapped lines end without a mark", similar_lines=True,
                  languages=("zh",)),
        _rule_set("encyclopedia", _CHINESE, no_english | _DUPLICATES | long,
                  changed=no_maximum, link_removal=True, line_rules=_PROSE_LINES,
                  lines_why="headings and lists end without a mark", similar_lines=True, languages=("zh",)),
        _rule_set("code", for_code, {name: "for prose" for name in RULES if name not in for_code},
                  changed={"length": Bounds(low=10)}, lines_why="for prose"),
        _rule_set("english", for_english, {
                      name: "counts characters, as is right for Chinese; the rules for words stand in its place"
                      for name in _CHINESE if name not in for_english},
                  link_removal=True, line_rules=tuple(LINE_RULES), similar_lines=True, languages=("en",)),
        _rule_set("light", for_light, no_english | {
                      name: "a good text of another kind, short or not Chinese, fails it"
                      for name in _CHINESE if name not in for_light},
                  # Of English documentation 9 % have more than 0.6 of their characters in repeated 10-grams.
                  changed={"length": Bounds(low=1), "bracket_fraction": Bounds(high=0.5),
                           "replacement_fraction": Bounds(high=0.05), _REPEATED[-1]: Bounds(high=0.9)},
                  line_rules=("bad_words",), lines_why="a line may be a whole text"),
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
        from ctllm_jax.config.errors import UserError

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
