"""The filter: cleans one document, and returns its text with all measured values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ctllm_jax.config.errors import unknown
from ctllm_jax.config.prepare import FilterConfig
from data_prep.rules import bad_words, blacklist, language, normalize
from data_prep.rules.lines import LINE_RULES, drop_lines
from data_prep.rules.links import remove_links
from data_prep.rules.registry import RULES
from data_prep.rules.sets import SETS, RuleSet, for_languages, with_thresholds
from data_prep.rules.view import View

EMPTY = "empty"
_NEED_LANGUAGE = ("language_score", "language")


class Outcome(NamedTuple):
    """The result of the filter.

    `text` is what is written on, if nothing failed; `failed` names the rules that failed (the first one in production
    mode); `values` holds what was measured; `language` and `score` are "" and 0.0 where they were not looked at;
    `removed` counts what was taken out: links, lines_RULE, surrogates.
    """

    text: str
    failed: tuple[str, ...]
    values: dict[str, float]
    language: str
    score: float
    removed: dict[str, int]


class Filter:
    """The rules of one set, with the thresholds of a config; lists and models are shared by all filters of a process.

    The order is: lone surrogates become U+FFFD; characters are simplified, where the config wants it; links go; the
    rules are measured, cheap ones first, the language on the raw text; lines that break a line rule go; punctuation
    becomes ASCII, where the config wants it. A document of which the line rules leave nothing, or fewer characters than
    the set's smallest length, fails with the rule `empty`.

    `languages` are the labels that a source keeps, also where its set does not look at the language; None: the set's
    own; empty: any.
    """

    def __init__(self, rule_set: str, config: FilterConfig, languages: Sequence[str] | None = None):
        if rule_set not in SETS:
            raise unknown("rule set", rule_set, list(SETS))
        chosen = with_thresholds(SETS, config.thresholds)[rule_set]
        self.rule_set: RuleSet = chosen if languages is None else for_languages(chosen, languages)
        self.config = config
        self._rules = [(name, RULES[name].measure, bounds) for name, bounds in self.rule_set.bounds.items()]
        self._blacklist = blacklist.load(config.url_blacklists, config.blacklist_categories)
        self._bad_words = bad_words.load(config.bad_words)
        wants_language = any(name in self.rule_set.bounds for name in _NEED_LANGUAGE)
        self._identify = language.load(config.language_model) if wants_language else None
        bounds = self.rule_set.bounds.get("length")
        self.smallest = max(1.0, bounds.low) if bounds else 1.0
        """Characters that must be left after the removal of lines."""

    def __reduce__(self):
        return Filter, (self.rule_set.name, self.config, self.rule_set.languages)

    def apply(self, text: str, url: str | None) -> Outcome:
        """Measure a document and clean it. In production mode stop at the first rule that fails."""
        view, removed = self.view(text, url)
        values: dict[str, float] = {}
        failed: list[str] = []
        stop_early = self.config.mode == "production"
        for name, measure, bounds in self._rules:
            values[name] = value = measure(view)
            if not bounds.keeps(value):
                failed.append(name)
                if stop_early:
                    return _outcome(view, view.text, failed, values, removed)
        text, dropped = drop_lines(view, self.rule_set.line_rules, self._bad_words)
        removed |= {f"lines_{name}": count for name, count in dropped.items()}
        if not text.strip() or dropped and self._length(text) < self.smallest:
            failed.append(EMPTY)
        if self.config.write_punctuation:
            text = normalize.normalize_punctuation(text)
        return _outcome(view, text, failed, values, removed)

    def _length(self, text: str) -> int:
        return View(text, published=self.rule_set.published).length

    def view(self, text: str, url: str | None) -> tuple[View, dict[str, int]]:
        """A document as the rules see it, and what was taken out before: surrogates, links."""
        raw, surrogates = normalize.without_surrogates(text)
        text = normalize.simplify(raw) if self.config.simplify else raw
        text, links = remove_links(text) if self.rule_set.link_removal else (text, 0)
        removed = {name: count for name, count in (("surrogates", surrogates), ("links", links)) if count}
        return View(text, raw=raw, url=url, blacklist=self._blacklist, identify=self._identify,
                    languages=self.rule_set.languages, published=self.rule_set.published), removed


def _outcome(view: View, text: str, failed: Sequence[str], values: dict[str, float],
             removed: dict[str, int]) -> Outcome:
    looked = any(name in values for name in _NEED_LANGUAGE)
    label, score = view.language if looked else ("", 0.0)
    return Outcome(text, tuple(failed), values, label, score, removed)


def explain(text: str, url: str | None, filter: Filter) -> list[tuple[str, str, float, float, float, bool, str]]:
    """Every rule of a filter for one document: (name, code, value, low, high, kept, what the rule is).

    All are measured, whatever the mode; low and high themselves are kept, unless the last field says "above". A line
    rule has the number of lines that it takes out as its value; it drops no document. The last row is `empty`: the
    characters that are left.
    """
    everything = Filter(filter.rule_set.name, filter.config.model_copy(update={"mode": "statistics"}),
                        filter.rule_set.languages)
    outcome = everything.apply(text, url)
    rows = [(name, RULES[name].code, value, bounds.low, bounds.high, bounds.keeps(value),
             f"Kept above {bounds.low:g}. " * bounds.above + RULES[name].doc)
            for name, value in outcome.values.items() for bounds in (everything.rule_set.bounds[name],)]
    for name in everything.rule_set.line_rules:
        rows.append((name, LINE_RULES[name].code, float(outcome.removed.get(f"lines_{name}", 0)), 0.0, math.inf, True,
                     f"Lines taken out. {LINE_RULES[name].doc}"))
    rows.append((EMPTY, "", float(everything._length(outcome.text)), float(everything.smallest), math.inf,
                 EMPTY not in outcome.failed, "Characters that are left after the removal of links and lines."))
    return rows
