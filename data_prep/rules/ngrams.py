"""D1 to D9: repetition of character n-grams. A position is a character; white space is no character.

Everything comes from one sort: three ids of 21 bits fit into 63, and the sorted 3-grams hold the counts of the 1-, 2-
and 3-grams. A repeated (n+1)-gram holds two repeated n-grams, so each longer n only looks at what n-1 left. Nothing is
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
    """What is repeated in a sequence of ids below 2^21 - 2 (code points are); O(N log N)."""
    size = len(ids)
    wide = np.empty(size + 2, np.uint64)
    # Two ids that do not occur fill up the last 3-grams, which are so made unique.
    wide[:size], wide[size:] = ids, ((1 << 21) - 1, (1 << 21) - 2)
    keys = (((wide[:size] << _BITS) | wide[1:size + 1]) << _BITS) | wide[2:]
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    counts = np.diff(_starts(ordered >> (_BITS + _BITS)))
    top, top_places = {}, {}
    top[2], top_places[2] = _most_frequent(_starts(ordered >> _BITS), order, size >= 2)
    starts = _starts(ordered)
    top[3], top_places[3] = _most_frequent(starts, order, size >= 3)
    places, ranks = _repeated(starts, order)
    found = {3: places}
    for n in range(4, LONGEST + 1):
        # The n-gram at a place is the (n-1)-gram there and the next id; both (n-1)-grams inside must be repeated.
        chosen = np.flatnonzero(places[1:] == places[:-1] + 1)
        places = places[chosen]
        keys = (ranks[chosen] << _BITS) | wide[places + (n - 1)]
        order = np.argsort(keys, kind="stable")
        starts = _starts(keys[order])
        if n == 4:
            top[4], top_places[4] = _most_frequent(starts, places[order], len(places) > 0)
            top[4] = top[4] or int(size >= 4)
        local, ranks = _repeated(starts, order)
        places = places[local]
        found[n] = places
    return Repetition(counts, top, top_places, found)


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
    """The indices in runs of two and more, ascending, and for each the number of its run, uint64."""
    lengths = np.diff(starts)
    several = np.repeat(lengths > 1, lengths)
    run = np.repeat(np.arange(len(lengths), dtype=np.uint64), lengths)
    ranks = np.empty(len(order), np.uint64)
    ranks[order] = run
    member = np.zeros(len(order), bool)
    member[order[several]] = True
    indices = np.flatnonzero(member)
    return indices, ranks[indices]


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
