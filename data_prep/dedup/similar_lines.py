"""Drop the later of two similar lines of a document.

A "line" is the released corpus's: text up to and with one of . ! ? 。 ！ ？ … ] 】, or up to a [ or 【. Beyond its
rule, marks that follow each other (……, ？！) and the closing quotes after them end one line together, a point between
ASCII letters or digits (3.14, a.com) ends none, and a line without a letter (…, 1.) is never a copy: to drop those
would spoil the text around them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ctllm_jax.config.errors import UserError

if TYPE_CHECKING:
    from ctllm_jax.config.prepare import SimilarLinesConfig

END = r"[!?。！？…\]】]|\.(?![0-9A-Za-z])|(?<![0-9A-Za-z])\."
BOUNDARY = re.compile(rf"(?:{END})(?:{END}|[”’」』）》〉])*|(?=[\[【])")
LETTER = re.compile(r"[^\W\d_]")
SKETCH_WORDS = 4
CODE_POINTS = 0x110000
BLOCK = 1 << 20
"""Pairs looked at in one numpy operation: 8 MiB an array."""


class Dropped(NamedTuple):
    """The text that stays, and how many lines and characters went."""

    text: str
    lines: int
    characters: int


def drop_similar_lines(text: str, config: SimilarLinesConfig) -> Dropped:
    """The text without each line that is similar to an earlier one that stays.

    Two lines (less the white space around them) are similar if their lengths differ by less than `max_length_gap` of
    the longer, their bags of characters have a Jaccard similarity of `min_jaccard` or more, and their edit distance is
    at most `max_distance` of the longer; where the shorter has `exact_below` characters or fewer, if they are equal.
    Lines that stay keep every character, white space included. Dropping a line may join its neighbours to one, so this
    goes on until nothing is similar: a second call changes nothing. UserError without the package rapidfuzz.
    """
    lines = characters = 0
    while True:
        pieces = split_lines(text)
        dropped = _later_ones(pieces, config)
        if not any(dropped):
            return Dropped(text, lines, characters)
        kept = "".join(piece for piece, drop in zip(pieces, dropped, strict=True) if not drop)
        lines += sum(dropped)
        characters += len(text) - len(kept)
        text = kept


def split_lines(text: str) -> list[str]:
    """The lines of a text, each with the white space before it; joined they are the text."""
    ends = [match.end() for match in BOUNDARY.finditer(text)]
    cuts = [0, *(end for end in ends if 0 < end < len(text)), len(text)]
    return [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False) if start < end]


def _later_ones(pieces: Sequence[str], config: SimilarLinesConfig) -> list[bool]:
    """Which lines are similar to an earlier one that stays. Equal lines by a table, the long others by `_search`."""
    dropped = [False] * len(pieces)
    places: dict[str, int] = {}
    for place, piece in enumerate(pieces):
        line = piece.strip()
        if line in places:
            dropped[place] = True
        elif LETTER.search(line):
            places[line] = place
    long = {line: place for line, place in places.items() if len(line) > config.exact_below}
    if len(long) > 1:
        for place, drop in zip(long.values(), _search(list(long), config), strict=True):
            dropped[place] = drop
    return dropped


def _search(lines: list[str], config: SimilarLinesConfig) -> list[bool]:
    """Which of these different lines are similar to an earlier one that stays.

    Every pair is looked at, but by numbers of a few bytes: an edit changes the length by at most 1, which characters
    occur an odd number of times by at most 2, and which pairs of neighbours do by at most 4. (20,000 lines of a log
    that differ in their digits: 2 s; without the pairs of neighbours 230 s.)
    """
    lengths = np.fromiter(map(len, lines), dtype=np.int32, count=len(lines))
    limits = np.floor(config.max_distance * lengths + 1e-9).astype(np.int32)
    characters, neighbors = _sketches(lines, lengths)
    folded_characters, folded_neighbors = (np.bitwise_xor.reduce(words, axis=1) for words in (characters, neighbors))
    dropped = [False] * len(lines)
    kept = np.zeros(0, dtype=np.int64)
    start = 0
    while start < len(lines):
        end = min(len(lines), start + max(1, BLOCK // (len(kept) + 256)), start + 256)
        rows = np.arange(start, end)
        columns = np.concatenate([kept, rows])
        limit = np.maximum(limits[rows, None], limits[columns])
        near = np.bitwise_count(folded_characters[rows, None] ^ folded_characters[columns]) <= 2 * limit
        near &= np.bitwise_count(folded_neighbors[rows, None] ^ folded_neighbors[columns]) <= 4 * limit
        near &= np.abs(lengths[rows, None] - lengths[columns]) <= limit
        later, earlier = np.nonzero(near)
        later, earlier = rows[later], columns[earlier]
        limit = np.maximum(limits[later], limits[earlier])
        close = earlier < later
        close &= np.bitwise_count(characters[later] ^ characters[earlier]).sum(axis=1, dtype=np.int32) <= 2 * limit
        close &= np.bitwise_count(neighbors[later] ^ neighbors[earlier]).sum(axis=1, dtype=np.int32) <= 4 * limit
        for place, other in zip(later[close].tolist(), earlier[close].tolist(), strict=True):
            if not dropped[place] and not dropped[other]:
                dropped[place] = _are_similar(lines[other], lines[place], config)
        kept = np.concatenate([kept, [place for place in range(start, end) if not dropped[place]]]).astype(np.int64)
        start = end
    return dropped


def _sketches(lines: list[str], lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [lines, SKETCH_WORDS] of the characters and of the pairs of neighbours: each is hashed to one of 256 bits,
    which tells whether an odd number of them came there."""
    points = np.frombuffer("".join(lines).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    starts = np.cumsum(lengths) - lengths
    pairs = points * np.uint64(CODE_POINTS)
    pairs[:-1] += points[1:]
    is_pair = np.ones(len(points), dtype=np.uint64)
    is_pair[starts + lengths - 1] = 0
    return _parities(points, np.uint64(1), starts), _parities(pairs, is_pair, starts)


def _parities(values: np.ndarray, ones: np.ndarray | np.uint64, starts: np.ndarray) -> np.ndarray:
    # The upper bits of a product with the golden ratio spread near values evenly (Knuth, TAOCP 6.4).
    hashes = values * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(56)
    bits = ones << (hashes & np.uint64(63))
    words = hashes >> np.uint64(6)
    return np.stack([np.bitwise_xor.reduceat(np.where(words == np.uint64(word), bits, np.uint64(0)), starts)
                     for word in range(SKETCH_WORDS)], axis=1)


def _are_similar(a: str, b: str, config: SimilarLinesConfig) -> bool:
    """The rule for two different lines that are both longer than `exact_below`."""
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise UserError("lines.enabled=true needs the package rapidfuzz: pip install 'ctllm-jax[prep]'") from None
    shorter, longer = sorted((len(a), len(b)))
    limit = int(config.max_distance * longer + 1e-9)
    if longer - shorter >= config.max_length_gap * longer or Levenshtein.distance(a, b, score_cutoff=limit) > limit:
        return False
    common = (Counter(a) & Counter(b)).total()
    return common >= config.min_jaccard * (len(a) + len(b) - common)
