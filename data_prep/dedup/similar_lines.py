"""Drop the later of two similar lines of a document.

A "line" is the released corpus's: text up to and with one of . ! ? 。 ！ ？ … ] 】, or up to a [ or 【. Beyond its
rule, marks that follow each other (……, ？！) and the closing quotes after them end one line together, a point between
ASCII letters or digits (3.14, a.com) ends none, and a line without a letter (…, 1.) is never a copy: to drop those
would spoil the text around them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ctllm_jax.config.errors import UserError
from data_prep.dedup import facts

if TYPE_CHECKING:
    from ctllm_jax.config.prepare import SimilarLinesConfig

END = r"[!?。！？…\]】]|\.(?![0-9A-Za-z])|(?<![0-9A-Za-z])\."
BOUNDARY = re.compile(rf"(?:{END})(?:{END}|[”’」』）》〉])*|(?=[\[【])")
LETTER = re.compile(r"[^\W\d_]")
SKETCH_WORDS = 4
CODE_POINTS = 0x110000
SHOWN_PAIRS = 3
"""Pairs of a document that are remembered."""
FEW = 256
"""Up to this many lines of a document are compared directly, without sketches."""
BLOCK, ROWS = 1024, 64
"""Lines taken at a time, in the order of the document, and of these at a time, by their lengths."""


class Dropped(NamedTuple):
    """The text that stays, how many lines and characters went, and some of the pairs of a line that went and a
    different one that stays."""

    text: str
    lines: int
    characters: int
    pairs: tuple[tuple[str, str], ...] = ()


def drop_similar_lines(text: str, config: SimilarLinesConfig) -> Dropped:
    """The text without each line that is similar to an earlier one that stays.

    Two lines (less the white space around them) are similar if their lengths differ by less than `max_length_gap` of
    the longer, their bags of characters have a Jaccard similarity of `min_jaccard` or more, and their edit distance is
    at most `max_distance` of the longer; where the shorter has `exact_below` characters or fewer, if they are equal.
    With `keep_different_facts`, lines that differ in what `facts` looks at are not similar.
    Lines that stay keep every character, white space included. Dropping a line may join its neighbours to one, so this
    repeats until no lines are similar, so a second call changes nothing. Raises UserError without the package
      rapidfuzz.
    """
    lines = characters = 0
    pieces, pairs = split_lines(text), []
    while True:
        earlier = _earlier_ones(pieces, config)
        kept = [piece for piece, other in zip(pieces, earlier, strict=True) if other is None]
        pairs += [(piece.strip(), other) for piece, other in zip(pieces, earlier, strict=True)
                  if other is not None and other != piece.strip()][:SHOWN_PAIRS - len(pairs)]
        lines += len(pieces) - len(kept)
        characters += len(text) - sum(map(len, kept))
        text = "".join(kept)
        pieces = split_lines(text)
        if pieces == kept:
            return Dropped(text, lines, characters, tuple(pairs))


def split_lines(text: str) -> list[str]:
    """The lines of a text, each with the white space before it; joined they are the text."""
    ends = [match.end() for match in BOUNDARY.finditer(text)]
    cuts = [0, *(end for end in ends if 0 < end < len(text)), len(text)]
    return [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False) if start < end]


def _earlier_ones(pieces: Sequence[str], config: SimilarLinesConfig) -> list[str | None]:
    """For each line an earlier one that stays and is similar, or None. Equal lines by a table, the long others by
    `_search`. Of many lines, such as a log's, only those with equal numbers are compared, since no others may go."""
    earlier: list[str | None] = [None] * len(pieces)
    places: dict[str, int] = {}
    for place, piece in enumerate(pieces):
        line = piece.strip()
        if line in places:
            earlier[place] = line
        elif LETTER.search(line):
            places[line] = place
    long = [line for line in places if len(line) > config.exact_below]
    together: dict[Hashable, list[str]] = {}
    by_facts = config.keep_different_facts and len(long) > FEW
    for line in long:
        together.setdefault(facts.signature(line) if by_facts else None, []).append(line)
    for lines in together.values():
        if len(lines) > 1:
            for line, other in zip(lines, _search(lines, config), strict=True):
                earlier[places[line]] = other
    return earlier


def _search(lines: list[str], config: SimilarLinesConfig) -> list[str | None]:
    """For each of these different lines an earlier one that stays and is similar, or None.

    Every pair whose lengths are near enough is looked at, but by numbers of a few bytes: an edit changes which
    characters occur an odd number of times by at most 2, and which pairs of neighbours do by at most 4. Few pairs are
    left for the edit distance itself. (20,000 lines of a log that differ in their digits: 230 s with the first of
    these two alone, 2 s with both.)
    """
    lengths = np.fromiter(map(len, lines), dtype=np.int32, count=len(lines))
    limits = np.floor(config.max_distance * lengths + 1e-9).astype(np.int32)
    measures = _sketches(lines, lengths)
    found: list[str | None] = [None] * len(lines)
    kept = np.zeros(0, dtype=np.int64)
    for start in range(0, len(lines), BLOCK):
        block = np.arange(start, min(len(lines), start + BLOCK))
        columns = np.concatenate([kept, block])
        columns = columns[np.argsort(lengths[columns], kind="stable")]
        pairs = [_near(rows, columns, lengths, limits, measures)
                 for rows in np.array_split(block[np.argsort(lengths[block], kind="stable")], -(-len(block) // ROWS))]
        later, earlier = np.concatenate(pairs, axis=1)
        order = np.lexsort((earlier, later))
        for place, other in zip(later[order].tolist(), earlier[order].tolist(), strict=True):
            if found[place] is None and found[other] is None and _are_similar(lines[other], lines[place], config):
                found[place] = lines[other]
        kept = np.concatenate([kept, block[[other is None for other in found[start : start + BLOCK]]]])
    return found


def _near(rows: np.ndarray, columns: np.ndarray, lengths: np.ndarray, limits: np.ndarray,
          measures: Sequence[tuple[np.ndarray, np.ndarray, int]]) -> np.ndarray:
    """int64 [2, pairs]: a line of `rows` and an earlier one of `columns` that may be similar. Both come by length."""
    shortest, longest = rows[0], rows[-1]
    first = np.searchsorted(lengths[columns], lengths[shortest] - limits[shortest])
    last = np.searchsorted(lengths[columns] - limits[columns], lengths[longest], side="right")
    columns = columns[first:last]
    limit = np.maximum(limits[rows, None], limits[columns])
    near = np.abs(lengths[rows, None] - lengths[columns]) <= limit
    for folded, _, flips in measures:
        near &= np.bitwise_count(folded[rows, None] ^ folded[columns]) <= flips * limit
    later, earlier = np.nonzero(near)
    later, earlier = rows[later], columns[earlier]
    limit = np.maximum(limits[later], limits[earlier])
    close = earlier < later
    for _, words, flips in measures:
        close &= np.bitwise_count(words[later] ^ words[earlier]).sum(axis=1, dtype=np.int32) <= flips * limit
    return np.stack([later[close], earlier[close]])


def _sketches(lines: list[str], lengths: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Of the characters, and of the pairs of neighbours: uint64 [lines], uint64 [lines, SKETCH_WORDS], flips an edit.

    Each character or pair is hashed to one of 64 bits (256 bits), which is set if an odd number of them has that hash.
    """
    points = np.frombuffer("".join(lines).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    starts = np.cumsum(lengths) - lengths
    pairs = points * np.uint64(CODE_POINTS)
    pairs[:-1] += points[1:]
    is_pair = np.ones(len(points), dtype=np.uint64)
    is_pair[starts + lengths - 1] = 0
    made = []
    for values, ones, flips in ((points, np.uint64(1), 2), (pairs, is_pair, 4)):
        words = _parities(values, ones, starts)
        made.append((np.bitwise_xor.reduce(words, axis=1), words, flips))
    return made


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
    return (common >= config.min_jaccard * (len(a) + len(b) - common)
            and not (config.keep_different_facts and facts.differ(a, b)))
