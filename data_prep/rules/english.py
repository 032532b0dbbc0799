"""Rules for English, where words are separated by spaces: Gopher (Rae et al. 2021, table A1) and C4's lines."""

from __future__ import annotations

from collections import Counter

import numpy as np

from data_prep.rules.registry import linear, logarithmic, rule
from data_prep.rules.repetition import Repetition, repetition
from data_prep.rules.view import View

_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))


@rule("english_words", "G1", low=50, high=100_000, cost=60, edges=logarithmic(1, 1e6), language="en")
def english_words(view: View) -> float:
    """Words: pieces of the measured text between white space."""
    return float(len(view.spaced_words))


@rule("english_word_length", "G2", low=3, high=10, cost=61, edges=linear(0, 12), language="en")
def english_word_length(view: View) -> float:
    """Mean length of the words between blanks, punctuation at them counted."""
    words = view.spaced_words
    return sum(map(len, words)) / len(words) if words else 0.0


@rule("english_symbol_fraction", "G3", high=0.1, cost=62, edges=linear(0, 0.2), language="en")
def english_symbol_fraction(view: View) -> float:
    """Occurrences of # or of ... (or …), whichever are more, / words."""
    count = max(view.measured.count("#"), view.measured.count("...") + view.measured.count("…"))
    return count / len(view.spaced_words) if view.spaced_words else 0.0


@rule("english_alphabetic_fraction", "G4", low=0.8, cost=65, language="en")
def english_alphabetic_fraction(view: View) -> float:
    """Words with at least one letter / words."""
    words = view.spaced_words
    return sum(any(map(str.isalpha, word)) for word in words) / len(words) if words else 0.0


@rule("english_stop_words", "G5", low=2, cost=64, edges=linear(0, 40), language="en")
def english_stop_words(view: View) -> float:
    """Distinct ones of the, be, to, of, and, that, have, with among the words, in any case."""
    return float(len(_STOP_WORDS.intersection(word.lower() for word in view.spaced_words)))


@rule("english_ellipsis_line_fraction", "G6", high=0.3, cost=63, language="en")
def english_ellipsis_line_fraction(view: View) -> float:
    """Lines that end in ... (or …) / lines that are not empty."""
    lines = view.measured_lines
    return sum(line.endswith(("...", "…")) for line in lines) / len(lines) if lines else 0.0


@rule("duplicate_line_fraction", "G7", high=0.3, cost=66, language="en")
def duplicate_line_fraction(view: View) -> float:
    """Lines that stood there before / lines that are not empty."""
    lines = view.measured_lines
    return (len(lines) - len(set(lines))) / len(lines) if lines else 0.0


@rule("duplicate_line_character_fraction", "G8", high=0.2, cost=67, language="en")
def duplicate_line_character_fraction(view: View) -> float:
    """Characters of the lines that stood there before / characters of the lines."""
    counts = Counter(view.measured_lines)
    total = sum(len(line) * count for line, count in counts.items())
    return sum(len(line) * (count - 1) for line, count in counts.items()) / total if total else 0.0


def _repetition(view: View) -> tuple[Repetition, np.ndarray]:
    """What is repeated in the sequence of words, and the length of each word, int64 [words]."""
    if "words" not in view.shared:
        numbers: dict[str, int] = {}
        words = view.spaced_words
        ids = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), np.int64, len(words))
        # 21 bits name a word; of a text with two million different ones the later share a name.
        found = repetition(np.minimum(ids, (1 << 21) - 16))
        view.shared["words"] = found, np.fromiter(map(len, words), np.int64, len(words))
    return view.shared["words"]


def _top_fraction(view: View, n: int) -> float:
    found, lengths = _repetition(view)
    covered = found.cover(n, np.concatenate([[0], np.cumsum(lengths)]), most_frequent=True)
    return covered / int(lengths.sum()) if covered else 0.0


def _covered_fraction(view: View, n: int) -> float:
    found, lengths = _repetition(view)
    places = found.later_places_of(n)
    if not len(places):
        return 0.0
    steps = np.zeros(len(lengths) + 1, np.int64)
    steps[places] += 1
    steps[places + n] -= 1
    return int(lengths[np.cumsum(steps[:-1]) > 0].sum()) / int(lengths.sum())


def _register(n: int, code: str, high: float) -> None:
    if n < 5:
        name, measure = f"english_top_{n}gram_fraction", lambda view: _top_fraction(view, n)
        measure.__doc__ = (f"Share of the words' characters that the most frequent {n}-gram covers, each once; "
                           "of equally frequent ones the most; 0 where none occurs twice.")
    else:
        name, measure = f"english_repeated_{n}gram_fraction", lambda view: _covered_fraction(view, n)
        measure.__doc__ = (f"Share of the words' characters that lie in a {n}-gram of words that occurs earlier in the "
                           "text too; each position counts once.")
    rule(name, code, high=high, cost=70 + n, version=2, language="en")(measure)


for _n, _high in ((2, 0.20), (3, 0.18), (4, 0.16), (5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)):
    _register(_n, f"G{_n + 7}", _high)
