"""S1, D10, D11: sentences."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from data_prep.rules.registry import logarithmic, rule
from data_prep.rules.view import SENTENCE_END, SENTENCE_ENDS, SPACE, View

_SPLIT = re.compile(f"[{re.escape(SENTENCE_ENDS)}]")


@rule("sentences", "S1", low=1, above=True, cost=45, edges=logarithmic(1, 1e4), version=2)
def sentences(view: View) -> float:
    """Pieces between `. ! … ? ; "` of the measured text (so also 。！？；“”) that hold more than white space.

    The end of a line ends a sentence too, because verse and lists have no other mark; published: it does not. A decimal
    point ends one, as in the release.
    """
    flags = view.flags if view.published else view.all_flags
    inside = (flags[(flags & (SENTENCE_END | SPACE)) != SPACE] & SENTENCE_END) == 0
    return float(np.count_nonzero(inside[1:] & ~inside[:-1]) + bool(len(inside) and inside[0]))


def _repeated(view: View) -> tuple[Counter, int]:
    if "sentences" not in view.shared:
        text = view.measured if view.published else view.measured.replace("\n", ".")
        pieces = [piece for piece in map(str.strip, _SPLIT.split(text)) if piece]
        view.shared["sentences"] = Counter(pieces), len(pieces)
    return view.shared["sentences"]


@rule("duplicate_sentence_fraction", "D10", high=0.30, cost=300, version=2)
def duplicate_sentence_fraction(view: View) -> float:
    """Sentences that stood there before / sentences; sentences as in S1, stripped."""
    counts, total = _repeated(view)
    return (total - len(counts)) / total if total else 0.0


@rule("duplicate_sentence_character_fraction", "D11", high=0.20, cost=310, version=2)
def duplicate_sentence_character_fraction(view: View) -> float:
    """Characters of the sentences that stood there before / characters of all sentences, white space inside counted."""
    counts, _ = _repeated(view)
    total = sum(len(piece) * count for piece, count in counts.items())
    return sum(len(piece) * (count - 1) for piece, count in counts.items()) / total if total else 0.0
