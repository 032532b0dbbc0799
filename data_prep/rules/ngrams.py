"""D1 to D9: repetition of character n-grams. A position is a character; white space is no character.

An n-gram of up to three characters fits exactly into 63 bits; longer ones are hashed to 64. For two different n-grams
of a document of 10,000 characters to collide has a chance below 1e-6 (44 bits of hash stay beside the position in
documents of up to a million), and would change one value by at most a few positions.
"""

from __future__ import annotations

import numpy as np

from data_prep.rules.registry import linear, rule
from data_prep.rules.view import View, run_lengths

_ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93], np.uint64)
_BITS = np.uint64(21)


def top_count(codes: np.ndarray, n: int) -> int:
    """How often the most frequent n-gram occurs (2 ≤ n ≤ 4), overlaps counted."""
    if len(codes) < n:
        return 0
    return int(run_lengths(np.sort(ngram_keys(codes.astype(np.uint64), n))).max())


def repeated(ids: np.ndarray, shortest: int = 5, longest: int = 10) -> list[np.ndarray]:
    """For n = shortest … longest: the places (ascending, int64) whose n-gram occurs more than once.

    A repeated (n+1)-gram holds two repeated n-grams, so each n looks only at the places that n-1 left. Time is
    O(N log N) for one n; in prose the later ones see a tenth of the positions. `ids` are below 2^21.
    """
    wide, result, places = ids.astype(np.uint64), [], None
    for n in range(shortest, longest + 1):
        if len(wide) < n:
            places = np.zeros(0, np.int64)
        elif places is None or len(places):
            places = _repeated(wide, n, places)
        result.append(places)
    return result


def covered(places: np.ndarray, n: int) -> int:
    """Positions that lie in [place, place + n) of at least one of the ascending places."""
    return int(np.minimum(np.diff(places), n).sum()) + n if len(places) else 0


def ngram_keys(wide: np.ndarray, n: int, places: np.ndarray | None = None) -> np.ndarray:
    """A number for the n-gram at each place (all, if none are given), uint64; equal for equal n-grams."""
    def at(offset: int) -> np.ndarray:
        return wide[offset:len(wide) - n + offset + 1] if places is None else wide[places + offset]

    words = []
    for start in range(0, n, 3):
        word = at(start)
        for offset in range(start + 1, min(start + 3, n)):
            word = (word << _BITS) | at(offset)
        words.append(word)
    if len(words) == 1:
        return words[0]
    mixed = words[0] * _ODD[0]
    for index, word in enumerate(words[1:]):
        mixed = (mixed ^ (mixed >> np.uint64(29))) * _ODD[(index + 1) % 3] + word * _ODD[index % 3]
    return (mixed ^ (mixed >> np.uint64(32))) * _ODD[2]


def _repeated(wide: np.ndarray, n: int, places: np.ndarray | None) -> np.ndarray:
    """Ascending places whose n-gram occurs more than once, int64; `places` are those of n-1."""
    last = len(wide) - n
    if places is not None:
        # Both (n-1)-grams inside must be repeated: place and place + 1 are both there.
        follows = places[1:] == places[:-1] + 1
        places = places[:-1][follows]
        places = places[places <= last]
        if not len(places):
            return places
    keys = ngram_keys(wide, n, places)
    bits = np.uint64(max(1, int(len(keys) - 1).bit_length()))
    ordered = np.sort((keys >> bits << bits) | np.arange(len(keys), dtype=np.uint64))
    same = (ordered[1:] ^ ordered[:-1]) >> bits == 0
    member = np.zeros(len(keys), bool)
    member[1:] = same
    member[:-1] |= same
    found = np.sort((ordered[member] & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64))
    return found if places is None else places[found]


def _top_fraction(view: View, n: int) -> float:
    return (top_count(view.codes, n) - 1) * n / view.length if view.length >= n else 0.0


def _covered_fraction(view: View, n: int) -> float:
    if "covered" not in view.repeats:
        view.repeats["covered"] = repeated(view.codes)
    return covered(view.repeats["covered"][n - 5], n) / view.length if view.length else 0.0


def _register(n: int, code: str, high: float) -> None:
    if n < 5:
        name, measure = f"top_{n}gram_fraction", lambda view: _top_fraction(view, n)
        measure.__doc__ = (f"(occurrences − 1) · {n} / characters, for the most frequent {n}-gram of characters; 0 in "
                           f"a text of fewer than {n}. The first occurrence is no repetition.")
    else:
        name, measure = f"repeated_{n}gram_fraction", lambda view: _covered_fraction(view, n)
        measure.__doc__ = (f"Share of the characters that lie in a {n}-gram that occurs more than once. Positions are "
                           f"counted, each once, and the first occurrence too.")
    rule(name, code, high=high, cost=100 + 30 * n, edges=linear(0.0, 0.5 if n < 5 else 1.0))(measure)


for _n, _code, _high in ((2, "D1", 0.20), (3, "D2", 0.18), (4, "D3", 0.16), *((n, f"D{n - 1}", 0.60)
                                                                               for n in range(5, 11))):
    _register(_n, _code, _high)
