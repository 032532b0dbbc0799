"""MinHash signatures of documents, and the keys of their LSH bands: the same bits on every machine.

Shapes: N documents, K permutations, B bands, T shingles of all documents of a call.

A shingle (`shingle` successive characters) becomes one 64-bit number: a polynomial in a fixed odd base, modulo 2^64,
of its code points, each first replaced by a mixed 64-bit value. The signature of a set of such numbers is rensa's
(algorithm version 2, after Fast Similarity Sketching, Dahlgaard et al., arXiv:1704.04370): three rounds throw each
number into one of K buckets with a 30-bit rank, a bucket keeps its lowest (earlier rounds win), and a bucket that
three rounds left empty takes the lowest of an affine permutation of all numbers. Work is thus linear in T and
independent of K, and each position of two signatures agrees with the probability of the sets' Jaccard similarity.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ctllm_jax.config.errors import UserError

if TYPE_CHECKING:
    from ctllm_jax.config.prepare import MinHashConfig

logger = logging.getLogger(__name__)

U64 = np.uint64
ROUNDS = 3
FRACTION_BITS = 30
BUCKET_DOMAIN = 0x6A09E667F3BCC909
ROUND_DOMAIN = 0x3C6EF372FE94F82B
FALLBACK_DOMAIN = 0xBB67AE8584CAA73B
"""The three constants are rensa's: they separate the rounds' hash functions."""
EMPTY = 0xFFFFFFFF
"""All of a signature without a shingle."""
GOLDEN = 0x9E3779B97F4A7C15
BASE = 0xD6E8FEB86659FD93
"""Odd, so that no shingle loses its first characters modulo 2^64."""
CODE_POINTS = 0x110000
CHUNK = 1 << 17
"""Code points hashed at a time: 1 MiB an array stays in the cache (three times as fast as 16 MiB)."""
MAX_ROWS = 255
"""Documents passed to rensa at a time; with 256 or more it starts threads in addition to our worker processes."""
MASK = (1 << 64) - 1


class Signatures(NamedTuple):
    """uint32 [N, K], and bool [N]: whether the document has a shingle at all. Those that have none all look alike."""

    values: np.ndarray
    long_enough: np.ndarray


def signatures(texts: Sequence[str], config: MinHashConfig) -> Signatures:
    """The MinHash signatures of documents, one a text, and which texts are as long as a shingle.

    Rows of shorter texts hold EMPTY everywhere and must not be compared: two of them agree in every band.
    UserError where `implementation` is `rensa` and it is missing or gives other bits than here are written down.
    """
    shingle, count = config.shingle, config.permutations
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    values = np.empty((len(texts), count), dtype=np.uint32)
    sketch = _rensa if _use_rensa(config.implementation) else _numpy
    for first, last in _groups(lengths):
        hashes = shingle_hashes("".join(texts[first:last]), shingle)
        hashes, offsets = _within(hashes, lengths[first:last], shingle)
        values[first:last] = sketch(hashes, offsets, count, config.seed)
    return Signatures(values, lengths >= shingle)


def band_keys(values: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """uint32 [N, K] signatures -> uint64 [N, B]: equal where a band's `rows` values are.

    Keys of different bands differ, so that bands may share a table. Sort out the documents that are too short first.
    """
    parts = np.ascontiguousarray(values[:, : bands * rows]).reshape(-1, bands, rows)
    keys = np.broadcast_to(np.arange(1, bands + 1, dtype=U64) * U64(GOLDEN), parts.shape[:2])
    for row in range(rows):
        keys = _splitmix(keys ^ parts[:, :, row])
    return keys


def match_probability(jaccard: float, bands: int, rows: int) -> float:
    """The probability that two documents of this Jaccard similarity agree in at least one band."""
    return 1.0 - (1.0 - jaccard**rows) ** bands


def jaccard(a: str, b: str, shingle: int) -> float:
    """The Jaccard similarity of two texts' sets of shingles; texts without a shingle are similar (1) only if equal.

    The sets are those of 64-bit hashes: two shingles are taken for one with a probability of 5e-20.
    """
    if min(len(a), len(b)) < shingle:
        return float(a == b)
    of_a, of_b = (np.unique(shingle_hashes(text, shingle)) for text in (a, b))
    common = len(np.intersect1d(of_a, of_b, assume_unique=True))
    return common / (len(of_a) + len(of_b) - common)


def shingle_hashes(text: str, shingle: int) -> np.ndarray:
    """uint64 [len(text) - shingle + 1], or [0]: the hash of each run of `shingle` characters, in order."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    count = max(0, len(points) - shingle + 1)
    hashes = np.empty(count, dtype=U64)
    for start in range(0, count, CHUNK):
        part = points[start : start + CHUNK + shingle - 1]
        hashes[start : start + CHUNK] = _polynomial(_mixed_points()[part], shingle)
    return hashes


def _polynomial(values: np.ndarray, width: int) -> np.ndarray:
    """Hashes of all runs of `width` values: runs of 1, 2, 4, … are doubled, and joined where `width` has a bit."""
    joined, joined_width = None, 0
    power, power_width = values, 1
    while power_width <= width:
        if width & power_width:
            # What is joined so far stands after the run of this size.
            joined = power if joined is None else _join(power, joined, power_width, joined_width)
            joined_width += power_width
        if 2 * power_width <= width:
            power = _join(power, power, power_width, power_width)
        power_width *= 2
    return joined


def _join(left: np.ndarray, right: np.ndarray, left_width: int, right_width: int) -> np.ndarray:
    """Hashes of the runs of `left_width + right_width` values, from those of their parts at every place."""
    count = len(left) - right_width
    hashes = left[:count] * U64(pow(BASE, right_width, 1 << 64))
    hashes += right[left_width : left_width + count]
    return hashes


@functools.cache
def _mixed_points() -> np.ndarray:
    """uint64 [CODE_POINTS]: a value for each character. Of the bare code points, sums of small multiples collide."""
    return _splitmix(np.arange(CODE_POINTS, dtype=U64))


def _groups(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of documents that are hashed together: about CHUNK characters, at most MAX_ROWS documents."""
    first = size = 0
    for index, length in enumerate(lengths.tolist()):
        if index > first and (size + length > CHUNK or index - first == MAX_ROWS):
            yield first, index
            first, size = index, 0
        size += length
    if first < len(lengths):
        yield first, len(lengths)


def _within(hashes: np.ndarray, lengths: np.ndarray, shingle: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of joined texts without those that reach from one into the next; uint64 [N + 1] offsets of each."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    counts = np.maximum(lengths - shingle + 1, 0)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(U64)
    parts = [hashes[start : start + count] for start, count in zip(starts.tolist(), counts.tolist(), strict=False)]
    return np.concatenate(parts), offsets


def _rensa(hashes: np.ndarray, offsets: np.ndarray, count: int, seed: int) -> np.ndarray:
    import rensa

    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, count, seed)
    rows = len(offsets) - 1
    return np.fromiter(itertools.chain.from_iterable(matrix.to_rows()), np.uint32, rows * count).reshape(rows, count)


def _numpy(hashes: np.ndarray, offsets: np.ndarray, count: int, seed: int) -> np.ndarray:
    """rensa's signatures, in numpy: uint64 [T] and [N + 1] -> uint32 [N, K]."""
    multipliers, increments = _permutations(count, seed)
    sizes = np.diff(offsets.astype(np.int64))
    values = np.full((len(sizes), count), EMPTY, dtype=np.uint32)
    left = np.flatnonzero(sizes)
    tokens, rows = hashes, np.repeat(np.arange(len(sizes)), sizes)
    for round_ in range(ROUNDS):
        mixed = _splitmix(tokens ^ U64(int(increments[0]) ^ BUCKET_DOMAIN ^ (round_ * ROUND_DOMAIN & MASK)))
        ranks = (mixed >> U64(64 - FRACTION_BITS)).astype(np.uint32) | np.uint32(round_ << FRACTION_BITS)
        np.minimum.at(values.reshape(-1), rows * count + _buckets(mixed, count), ranks)
        # Later rounds only concern documents with a bucket that is still empty: short ones.
        left = left[(values[left] >= (round_ + 1) << FRACTION_BITS).any(axis=1)]
        if not len(left):
            return values
        still = np.isin(rows, left)
        tokens, rows = tokens[still], rows[still]
    for row in left.tolist():
        missing = np.flatnonzero(values[row] >= ROUNDS << FRACTION_BITS)
        distinct = np.unique(hashes[int(offsets[row]) : int(offsets[row + 1])])
        mixed = _splitmix(distinct ^ U64(int(multipliers[0]) ^ FALLBACK_DOMAIN))
        affine = multipliers[missing, None] * mixed + increments[missing, None]
        lowest = (affine >> U64(32)).astype(np.uint32).min(axis=1)
        values[row, missing] = lowest >> np.uint32(2) | np.uint32(ROUNDS << FRACTION_BITS)
    return values


def _buckets(mixed: np.ndarray, count: int) -> np.ndarray:
    """int64: a bucket below `count` from the low 32 bits, each exactly as likely (Lemire, arXiv:1805.10941)."""
    threshold = U64((1 << 32) % count)
    product = (mixed & U64(EMPTY)) * U64(count)
    buckets = (product >> U64(32)).astype(np.int64)
    rejected = np.flatnonzero((product & U64(EMPTY)) < threshold)
    mixed = mixed[rejected]
    while len(rejected):
        mixed = _splitmix(mixed)
        product = (mixed & U64(EMPTY)) * U64(count)
        buckets[rejected] = (product >> U64(32)).astype(np.int64)
        again = (product & U64(EMPTY)) < threshold
        mixed, rejected = mixed[again], rejected[again]
    return buckets


@functools.cache
def _permutations(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Odd multipliers and increments, uint64 [K] each, of xoshiro256++ seeded by splitmix64 (prng.di.unimi.it)."""
    state = [int(_splitmix(np.array([seed + index * GOLDEN & MASK], dtype=U64))[0]) for index in range(4)]
    drawn = []
    for _ in range(2 * count):
        drawn.append((_rotate((state[0] + state[3]) & MASK, 23) + state[0]) & MASK)
        shifted = state[1] << 17 & MASK
        state[2] ^= state[0]
        state[3] ^= state[1]
        state[1] ^= state[2]
        state[0] ^= state[3]
        state[2] ^= shifted
        state[3] = _rotate(state[3], 45)
    return np.array(drawn[::2], dtype=U64) | U64(1), np.array(drawn[1::2], dtype=U64)


def _rotate(value: int, bits: int) -> int:
    return (value << bits | value >> (64 - bits)) & MASK


def _splitmix(values: np.ndarray) -> np.ndarray:
    """splitmix64 of each value: one-to-one, each bit in changes each bit out with probability one half."""
    mixed = values + U64(GOLDEN)
    mixed ^= mixed >> U64(30)
    mixed *= U64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> U64(27)
    mixed *= U64(0x94D049BB133111EB)
    mixed ^= mixed >> U64(31)
    return mixed


def _use_rensa(implementation: str) -> bool:
    """Whether to call rensa. Raises UserError if it is required and unusable."""
    if implementation == "numpy":
        return False
    complaint = _rensa_complaint()
    if complaint and implementation == "rensa":
        raise UserError(f"minhash.implementation=rensa: {complaint}, or minhash.implementation=numpy, which is slower")
    return not complaint


@functools.cache
def _rensa_complaint() -> str | None:
    """Why rensa is unusable; None if it gives our bits. Its algorithm changed between 0.4 and 0.5."""
    hashes = _splitmix(np.arange(1500, dtype=U64))
    offsets = np.array([0, 1, 40, 300, 1500], dtype=U64)
    try:
        same = all(np.array_equal(_rensa(hashes, offsets, count, 7), _numpy(hashes, offsets, count, 7))
                   for count in (100, 128))
    except ImportError:
        return "needs the package rensa: pip install 'ctllm-jax[prep]'"
    except AttributeError:
        same = False
    if same:
        return None
    complaint = "this version of rensa gives other signatures: pip install 'rensa>=0.5,<0.6'"
    logger.warning("minhash: %s; numpy is used unless rensa is asked for", complaint)
    return complaint
