"""Which n-grams of a sequence occur more than once.

Everything comes from two sorts. Three ids of 21 bits fit into 63: the sorted 3-grams hold the counts of the 1-, 2- and
3-grams. Where a 3-gram is repeated, the ids behind it decide in the second sort how far the repetition goes. Nothing is
hashed: the values are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LONGEST = 10
_BITS = np.uint64(21)
_NONCHARACTERS = 0xFDD0


class Repetition(NamedTuple):
    """What is repeated in a sequence of N ids.

    `counts`: how often each distinct id occurs, int64, in no order. `places`, ascending, and `longest`, both int64:
    where a repeated 3-gram starts, and the length, 3 … 10, of the longest repeated n-gram that starts there (10 stands
    for more too). `runs[n]`, n = 2, 3, 4: (starts, order), where order[starts[i]:starts[i + 1]] are the places of one
    n-gram; without those 4-grams that cannot be repeated. `longest_later`: the length, 5 … 10, of the
    longest n-gram that starts there and occurs earlier in the sequence too; less where there is none.
    """

    counts: np.ndarray
    places: np.ndarray
    longest: np.ndarray
    runs: dict[int, tuple[np.ndarray, np.ndarray]]
    longest_later: np.ndarray

    def places_of(self, n: int) -> np.ndarray:
        """Where an n-gram (3 ≤ n ≤ 10) starts that occurs more than once, ascending, int64."""
        return self.places[self.longest >= n]

    def later_places_of(self, n: int) -> np.ndarray:
        """Where an n-gram (5 ≤ n ≤ 10) starts that occurs earlier in the sequence too, ascending, int64."""
        return self.places[self.longest_later >= n]

    def cover(self, n: int, ends: np.ndarray, *, most_frequent: bool) -> int:
        """What the occurrences of one n-gram (2 ≤ n ≤ 4) cover: the most that any repeated n-gram does; 0 without one.

        A position counts once, however many occurrences cover it. `ends`: int64 [N + 1], what the positions before each
        one count together. `most_frequent`: only of the n-grams that occur most often, overlaps counted.
        """
        starts, order = self.runs[n]
        sizes = starts[1:] - starts[:-1]
        chosen = sizes > 1
        if not chosen.any():
            return 0
        if most_frequent:
            chosen = sizes == sizes.max()
        places, sizes = order[np.repeat(chosen, sizes)], sizes[chosen]
        number = np.repeat(np.arange(len(sizes)), sizes)
        places = places[np.lexsort((places, number))]
        stops = places + n
        stops[:-1] = np.where(number[1:] == number[:-1], np.minimum(stops[:-1], places[1:]), stops[:-1])
        return int(np.add.reduceat(ends[stops] - ends[places], np.cumsum(sizes) - sizes).max())


def repetition(ids: np.ndarray) -> Repetition:
    """What is repeated in a sequence of ids below 2^21 - 9 (code points are); O(N log N)."""
    ids, size, behind = np.asarray(ids, np.uint32), len(ids), LONGEST - 1
    # Behind the end stand nine ids that do not occur: no n-gram that reaches over it is repeated. Where those can be
    # nine of Unicode's noncharacters, everything fits into 16 bits, and numpy sorts by radix, three times as fast.
    short = not size or ids.max() < 2**16 and not (ids - np.uint32(_NONCHARACTERS) < behind).any()
    padded = np.empty(size + behind, np.uint16 if short else np.uint32)
    padded[:size] = ids
    padded[size:] = np.arange(behind) + (_NONCHARACTERS if short else (1 << 21) - behind)
    wide = padded[:size + 2].astype(np.uint64)
    grams = (((wide[:-2] << _BITS) | wide[1:-1]) << _BITS) | wide[2:]
    order = np.lexsort((padded[2:size + 2], padded[1:size + 1], padded[:size]))
    ordered = grams[order]
    starts = _starts(ordered)
    singles = _starts(ordered >> (_BITS + _BITS))
    runs = {2: (_starts(ordered >> _BITS), order), 3: (starts, order)}

    places, numbers = _repeated(starts, order)
    longest = np.full(len(places), 3)
    # A repeated 4-gram starts where two repeated 3-grams start one after the other: an eighth of the places in prose.
    # Sorted by what follows, the places that have most in common with another one stand beside it.
    both = np.flatnonzero(places[1:] == places[:-1] + 1)
    tails = padded[places[both][:, None] + np.arange(3, LONGEST)]
    numbers = numbers[both].astype(np.uint16 if size < 2**16 else np.int64)
    order = np.lexsort((*tails.T[::-1], numbers))
    tails, numbers = tails[order], numbers[order]
    same = tails[1:] == tails[:-1]
    same[:, 0] &= numbers[1:] == numbers[:-1]
    common = np.full(len(both) + 1, 3)
    common[1:-1] += np.logical_and.accumulate(same, axis=1).sum(axis=1)[:max(0, len(both) - 1)]
    near, sorted_places = np.maximum(common[1:], common[:-1]), places[both[order]]
    longest[both[order]], later = near, np.zeros(len(places), np.int64)
    inside = np.flatnonzero(near > 4)
    later[both[order[inside]]] = _longest_later(sorted_places[inside], common[inside])
    runs[4] = np.flatnonzero(common == 3), sorted_places
    return Repetition(singles[1:] - singles[:-1], places, longest, runs, later)


def _longest_later(places: np.ndarray, common: np.ndarray) -> np.ndarray:
    """For each of the sorted places the longest n-gram there, 5 … 10, that starts at an earlier place too; 4: none.

    `common`: how many ids a place has in common with the one before it in this order.
    """
    lengths = np.arange(5, LONGEST + 1)
    starts = np.flatnonzero(common < lengths[:, None])
    rows = np.tile(places, len(lengths))
    first = np.minimum.reduceat(rows, starts) if len(rows) else rows
    later = rows != np.repeat(first, np.diff(starts, append=len(rows)))
    return 4 + later.reshape(len(lengths), -1).sum(axis=0)


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Where the runs of equal values of a sorted array start, and its length at the end; int64."""
    bounds = np.ones(len(ordered) + 1, bool)
    bounds[1:-1] = ordered[1:] != ordered[:-1]
    return np.flatnonzero(bounds)


def _repeated(starts: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places in runs of two and more, ascending, and for each the number of its run among these; int64."""
    lengths = starts[1:] - starts[:-1]
    several = lengths > 1
    number_of = np.full(len(order), -1)
    number_of[order[np.repeat(several, lengths)]] = np.repeat(np.arange(np.count_nonzero(several)), lengths[several])
    places = np.flatnonzero(number_of >= 0)
    return places, number_of[places]


def covered(places: np.ndarray, n: int) -> int:
    """Positions that lie in [place, place + n) of at least one of the ascending places."""
    return int(np.minimum(places[1:] - places[:-1], n).sum()) + n if len(places) else 0
