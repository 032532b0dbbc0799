"""U1, S2 to S5, S7, S10 to S12: what kinds of characters a text is made of."""

from __future__ import annotations

import re

import numpy as np

from data_prep.rules.registry import linear, logarithmic, rule
from data_prep.rules.view import DIGIT, DOT, HASH, PUNCTUATION, View

_BRACKETS = re.compile("【[^【】]*】")
_WINDOW = 1000
"""Characters of a window of `distinct_fraction`: its bound, 0.1, is one for texts of about this length."""
_OFFSETS = np.arange(_WINDOW, dtype=np.int16)


@rule("bracket_fraction", "U1", high=0.1, cost=5)
def bracket_fraction(view: View) -> float:
    """Characters inside 【…】, the brackets not counted, / all characters of the raw text, white space included.

    An opening bracket that is not closed opens nothing; of nested brackets the inner pair counts.
    """
    if "【" not in view.text:
        return 0.0
    return sum(len(found) - 2 for found in _BRACKETS.findall(view.text)) / len(view.text)


@rule("length", "S2", low=50, high=10_000, cost=40, edges=logarithmic(1, 1e6), domain="any")
def length(view: View) -> float:
    """Characters of the measured text (NFKC), white space not counted."""
    return float(view.length)


@rule("word_length", "S3", low=1.3, high=10, cost=900, edges=linear(0, 4))
def word_length(view: View) -> float:
    """Mean length of the segmented words (rjieba with its model for unknown words), punctuation left out.

    Of the first 1,000 characters; segmentation is the dearest of all rules. 0 in a text without words.
    """
    words = view.segmented
    return sum(map(len, words)) / len(words) if words else 0.0


@rule("hash_fraction", "S4", high=0.1, cost=50, edges=linear(0, 0.2))
def hash_fraction(view: View) -> float:
    """Runs of # / characters: a run is one symbol, however long (Gopher's symbol-to-word ratio)."""
    return _runs((view.flags & HASH) != 0) / view.length if view.length else 0.0


@rule("ellipsis_fraction", "S5", high=0.1, cost=50, edges=linear(0, 0.2))
def ellipsis_fraction(view: View) -> float:
    """Runs of … or of two and more full stops / characters: a run is one symbol, however long.

    Chinese full stops count (。。 is .. after U2), and …, which NFKC makes three full stops.
    """
    dots = (view.flags & DOT) != 0
    if not dots.any():
        return 0.0
    # A single full stop starts a run and has no dot behind it.
    pairs = dots[:-1] & dots[1:]
    return _runs(pairs) / view.length


@rule("digit_fraction", "S7", high=0.3, cost=50)
def digit_fraction(view: View) -> float:
    """Digits (Unicode Nd) / characters that are no punctuation; Chinese numerals such as 三 are no digits."""
    others = int(np.count_nonzero((view.flags & PUNCTUATION) == 0))
    return int(np.count_nonzero(view.flags & DIGIT)) / others if others else 0.0


@rule("punctuation_fraction", "S10", low=0, above=True, cost=50, edges=linear(0, 0.5), version=2)
def punctuation_fraction(view: View) -> float:
    """Punctuation (Unicode P, ASCII symbols) and line breaks / characters: a heap of keywords has none.

    A line break counts because verse and lists may have no other mark; published: it does not.
    """
    if not view.length:
        return 0.0
    breaks = 0 if view.published else max(0, len(view.measured_lines) - 1)
    return (int(np.count_nonzero(view.flags & PUNCTUATION)) + breaks) / view.length


@rule("distinct_fraction", "S11", low=0.1, above=True, cost=140, version=2)
def distinct_fraction(view: View) -> float:
    """Distinct characters / characters; of a text longer than 1,000 characters the mean over windows of 1,000.

    The share of a whole text falls with its length, whatever is written in it. There are as many windows as cover the
    text, evenly spaced; published: the share of the whole text.
    """
    if not view.length:
        return 0.0
    if view.published or view.length <= _WINDOW:
        return len(view.repetition.counts) / view.length
    codes, count, distinct = view.codes.astype(np.intp), -(-view.length // _WINDOW), 0
    place = np.empty(int(codes.max()) + 1, np.int16)
    for number in range(count):
        start = number * (view.length - _WINDOW) // (count - 1)
        window = codes[start:start + _WINDOW]
        place[window] = _OFFSETS  # One offset stays for each character.
        distinct += int(np.count_nonzero(place[window] == _OFFSETS))
    return distinct / (count * _WINDOW)


@rule("entropy", "S12", low=3, cost=145, edges=linear(0, 8))
def entropy(view: View) -> float:
    """Entropy of the distribution of characters, in nats."""
    if not view.length:
        return 0.0
    shares = view.repetition.counts / view.length
    return max(0.0, float(-(shares * np.log(shares)).sum()))


def _runs(mask: np.ndarray) -> int:
    """How many runs of True there are."""
    return int(np.count_nonzero(mask[1:] & ~mask[:-1])) + bool(len(mask) and mask[0])
