"""D1 to D9: repetition of character n-grams. A position is a character; white space is no character.

Everything comes from two sorts. Three ids of 21 bits fit into 63: the sorted 3-grams hold the counts of the 1-, 2- and
3-grams. Where a 3-gram is repeated, the ids behind it decide in the second sort how far the repetition goes. Nothing is
hashed: the values are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_prep.rules.registry import linear, rule
from data_prep.rules.view import View

LONGEST = 10
_BITS = np.uint64(21)


class Repetition(NamedTuple):
    """What is repeated in a sequence of N ids.

    `counts`: how often each distinct id occurs, int64, in no order. `top[n]`, n = 2, 3, 4: how often the most frequent
    n-gram occurs, overlaps counted, 0 without one; `top_places[n]`: where one of the most frequent starts, for each of
    them. `places[n]`, n = 3 … 10: where an n-gram starts that occurs more than once; ascending, int64.
    """

    counts: np.ndarray
    top: dict[int, int]
    top_places: dict[int, np.ndarray]
    places: dict[int, np.ndarray]


def repetition(ids: np.ndarray) -> Repetition:
    """What is repeated in a sequence of ids below 2^21 - 9 (code points are); O(N log N)."""
    size = len(ids)
    # Nine ids that do not occur stand behind the end: no n-gram that reaches over it is repeated.
    padded = np.empty(size + LONGEST - 1, np.uint32)
    padded[:size], padded[size:] = ids, (1 << 21) - 1 - np.arange(LONGEST - 1)
    wide = padded.astype(np.uint64)
    grams = (((wide[:-2] << _BITS) | wide[1:-1]) << _BITS) | wide[2:]
    keys = grams[:size]
    order = _order(keys, padded)
    ordered = keys[order]
    starts = _starts(ordered)
    counts = np.diff(_starts(ordered >> (_BITS + _BITS)))
    top, top_places = {}, {}
    top[2], top_places[2] = _most_frequent(_starts(ordered >> _BITS), order, size >= 2)
    top[3], top_places[3] = _most_frequent(starts, order, size >= 3)
    places, runs = _repeated(starts, order)
    found = {3: places}
    # A repeated 4-gram starts where two repeated 3-grams start one after the other: an eighth of the places in prose.
    both = np.flatnonzero(places[1:] == places[:-1] + 1)
    places, runs = places[both], runs[both]
    order = np.lexsort((padded[places + 9], grams[places + 6], grams[places + 3], runs))
    tails = padded[places[:, None] + np.arange(3, LONGEST)]
    same = tails[order[1:]] == tails[order[:-1]]
    same[:, 0] &= runs[order[1:]] == runs[order[:-1]]
    # How long the n-gram is that a place has in common with the one before it in order, 4 … 10; 3: less than four.
    common = np.full(len(places) + 1, 3)
    common[1:-1] = 3 + np.logical_and.accumulate(same, axis=1).sum(axis=1) if len(places) else 3
    longest = np.empty(len(places), np.int64)
    longest[order] = np.maximum(common[1:], common[:-1]) if len(places) else 0
    top[4], top_places[4] = _most_frequent(np.flatnonzero(common < 4), places[order], len(places) > 0)
    top[4] = top[4] or int(size >= 4)
    found |= {n: places[longest >= n] for n in range(4, LONGEST + 1)}
    return Repetition(counts, top, top_places, found)


def _order(keys: np.ndarray, padded: np.ndarray) -> np.ndarray:
    """What sorts the 3-grams: by radix, three times as fast, where all ids fit into 16 bits beside the two behind."""
    if len(keys) and padded[:len(keys)].max() < 2**16 - 2:
        short = padded[:len(keys) + 2].astype(np.uint16)
        return np.lexsort((short[2:], short[1:-1], short[:-2]))
    return np.argsort(keys, kind="stable")


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Where the runs of equal values of a sorted array start, and its length at the end; int64."""
    if not len(ordered):
        return np.zeros(1, np.int64)
    changes = np.flatnonzero(ordered[1:] != ordered[:-1])
    starts = np.empty(len(changes) + 2, np.int64)
    starts[0], starts[-1] = 0, len(ordered)
    np.add(changes, 1, out=starts[1:-1])
    return starts


def _most_frequent(starts: np.ndarray, order: np.ndarray, any_there: bool) -> tuple[int, np.ndarray]:
    if not any_there:
        return 0, np.zeros(0, np.int64)
    lengths = np.diff(starts)
    return int(lengths.max()), order[starts[:-1][lengths == lengths.max()]]


def _repeated(starts: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places in runs of two and more, ascending, and for each the number of its run, int64."""
    lengths = np.diff(starts)
    several = lengths > 1
    run_of = np.full(len(order), -1)
    run_of[order] = np.repeat(np.where(several, np.arange(len(lengths)), -1), lengths)
    places = np.flatnonzero(run_of >= 0)
    return places, run_of[places]


def covered(places: np.ndarray, n: int) -> int:
    """Positions that lie in [place, place + n) of at least one of the ascending places."""
    return int(np.minimum(np.diff(places), n).sum()) + n if len(places) else 0


def _top_fraction(view: View, n: int) -> float:
    return max(0, view.repetition.top[n] - 1) * n / view.length if view.length else 0.0


def _covered_fraction(view: View, n: int) -> float:
    return covered(view.repetition.places[n], n) / view.length if view.length else 0.0


def _register(n: int, code: str, high: float) -> None:
    if n < 5:
        name, measure = f"top_{n}gram_fraction", lambda view: _top_fraction(view, n)
        measure.__doc__ = (f"(occurrences − 1) · {n} / characters, for the most frequent {n}-gram of characters; 0 in "
                           f"a text of fewer than {n}. The first occurrence is no repetition.")
    else:
        name, measure = f"repeated_{n}gram_fraction", lambda view: _covered_fraction(view, n)
        measure.__doc__ = (f"Share of the characters that lie in a {n}-gram that occurs more than once. Positions are "
                           f"counted, each once, and the first occurrence too.")
    rule(name, code, high=high, cost=150 + n, edges=linear(0.0, 0.5 if n < 5 else 1.0))(measure)


for _n, _code, _high in ((2, "D1", 0.20), (3, "D2", 0.18), (4, "D3", 0.16), *((n, f"D{n - 1}", 0.60)
                                                                               for n in range(5, 11))):
    _register(_n, _code, _high)
