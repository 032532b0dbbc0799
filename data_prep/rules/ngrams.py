"""D1 to D9: repetition of character n-grams. A position is a character; white space is no character."""

from __future__ import annotations

import numpy as np

from data_prep.rules.registry import linear, rule
from data_prep.rules.repetition import covered
from data_prep.rules.view import View


def _top_fraction(view: View, n: int) -> float:
    found = view.repetition
    starts, order = found.runs[n]
    if len(starts) < 2:
        return 0.0
    sizes = starts[1:] - starts[:-1]
    top = int(sizes.argmax())
    most = covered(np.sort(order[starts[top]:starts[top + 1]]), n)
    if most < sizes[top] * n:
        # The most frequent n-gram overlaps itself, as in ====: another one may cover more.
        most = found.cover(n, np.arange(view.length + 1), most_frequent=False)
    return max(0, most - n) / view.length


def _covered_fraction(view: View, n: int) -> float:
    found = view.repetition
    places = found.places_of(n) if view.published else found.later_places_of(n)
    return covered(places, n) / view.length if view.length else 0.0


def _register(n: int, code: str, high: float) -> None:
    if n < 5:
        name, measure = f"top_{n}gram_fraction", lambda view: _top_fraction(view, n)
        measure.__doc__ = (f"(occurrences − 1) · {n} / characters, for the most frequent {n}-gram of characters. Where "
                           "occurrences overlap, a character counts once, and the one that covers most is taken.")
    else:
        name, measure = f"repeated_{n}gram_fraction", lambda view: _covered_fraction(view, n)
        measure.__doc__ = (f"Share of the characters that lie in a {n}-gram that occurs earlier in the text too. "
                           "Positions are counted, each once; published: the first occurrence too.")
    rule(name, code, high=high, cost=150 + n, edges=linear(0.0, 0.5 if n < 5 else 1.0), version=2)(measure)


for _n, _code, _high in ((2, "D1", 0.20), (3, "D2", 0.18), (4, "D3", 0.16), *((n, f"D{n - 1}", 0.60)
                                                                               for n in range(5, 11))):
    _register(_n, _code, _high)
