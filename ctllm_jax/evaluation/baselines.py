"""Bits per byte of two classical compression methods on held-out text, as a baseline for a trained model.

Both are trained on all training documents of one source, and encode each held-out document and its end. Figures are
bits per byte of UTF-8 text, as in `bits_per_byte`: document ends cost bits, but have no bytes.
"""

from __future__ import annotations

import lzma
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

XZ = "xz -9e"
TRIGRAM = "character 3-gram"

_SYMBOLS = 0x110000 - 0x800 + 1
"""Unicode scalar values (code points without surrogates), and the end of a document."""

# xz compresses only bytes; this byte does not occur in UTF-8 text except as a control character.
_END_BYTE = b"\x00"


def measure_baselines(train: Mapping[str, Sequence[str]], held_out: Mapping[str, Sequence[str]], *,
                      threads: int = 2) -> dict[str, dict[str, float]]:
    """Bits per byte of each baseline on each source: `{name: {source: bits}}`.

    Args:
      train: source -> documents.
      held_out: source -> documents; each of its sources must be in `train`.
      threads: number of compressions and models at once; both release the interpreter lock most of the time.
    """
    if missing := set(held_out) - set(train):
        raise ValueError(f"held_out has sources without training text: {', '.join(sorted(missing))}")
    methods = {XZ: xz_bits_per_byte, TRIGRAM: trigram_bits_per_byte}
    # The longest first, so that none runs alone at the end.
    tasks = sorted(((source, name) for name in methods for source in held_out),
                   key=lambda task: (task[1] != XZ, -sum(map(len, train[task[0]]))))
    results: dict[str, dict[str, float]] = {name: {} for name in methods}
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(methods[name], train[source], held_out[source]) for source, name in tasks]
        for (source, name), future in zip(tasks, futures, strict=True):
            results[name][source] = future.result()
    return results


def xz_bits_per_byte(train: Sequence[str], held_out: Sequence[str]) -> float:
    """Bits per byte that `xz -9e` needs for `held_out` after `train`: the growth of the compressed stream.

    Beyond 64 MiB, its dictionary, it would forget the beginning.
    """
    before, text = _joined(train), _joined(held_out)
    return 8 * (_compressed_size(before + text) - _compressed_size(before)) / _bytes_of(held_out)


def trigram_bits_per_byte(train: Sequence[str], held_out: Sequence[str]) -> float:
    """Bits per byte of a Witten-Bell interpolated character 3-gram model, trained on `train`."""
    return -float(np.sum(np.log2(TrigramModel(train).probabilities(held_out)))) / _bytes_of(held_out)


class Counts(NamedTuple):
    """Sorted n-grams [n] and how often each occurs; sorted contexts [m], their occurrences and distinct successors."""

    grams: np.ndarray
    gram_counts: np.ndarray
    contexts: np.ndarray
    context_counts: np.ndarray
    successors: np.ndarray


class TrigramModel:
    """Characters predicted from the two before them, interpolated: Witten and Bell's method C (1991).

    P(c | h) = (count(h c) + T(h) · P(c | h')) / (count(h) + T(h)) with T(h) the number of distinct characters seen
    after h, and h' the history without its first character. The empty history falls back to the uniform distribution
    over all Unicode scalar values and the end of a document, so probabilities of all texts sum to 1. A document begins
    after two ends.
    """

    def __init__(self, documents: Sequence[str]):
        stream = _stream(documents)
        self._orders = [_count(stream.context(length), stream.paid) for length in range(3)]

    def probabilities(self, documents: Sequence[str]) -> np.ndarray:
        """Probability of each character of each document and of its end, in order: float64 [characters + documents]."""
        stream = _stream(documents)
        return self._interpolate([stream.context(length) for length in range(3)], stream.paid)

    def distribution(self, history: str, symbols: Sequence[str]) -> np.ndarray:
        """Probability of each of `symbols` (a character, or "" for the end of the document) after `history`."""
        first, second = _stream([history]).ids[-4:-2]
        following = np.array([ord(symbol) if symbol else _END for symbol in symbols], np.uint64)
        contexts = [np.uint64(0), second, first << _BITS | second]
        return self._interpolate([np.full(following.shape, context) for context in contexts], following)

    def _interpolate(self, contexts: Sequence[np.ndarray], following: np.ndarray) -> np.ndarray:
        probability = np.full(following.shape, 1 / _SYMBOLS)
        for counts, context in zip(self._orders, contexts, strict=True):
            occurrences = _look_up(counts.contexts, counts.context_counts, context)
            distinct = _look_up(counts.contexts, counts.successors, context)
            together = _look_up(counts.grams, counts.gram_counts, context << _BITS | following)
            seen = occurrences > 0
            total = np.where(seen, occurrences + distinct, 1)
            probability = np.where(seen, (together + distinct * probability) / total, probability)
        return probability


_BITS = np.uint64(21)  # a code point has 21: three fill 63 of 64
_END = np.uint64(0x110000)  # the first number that is no code point


class Stream(NamedTuple):
    """Documents as numbers, uint64: `ids` begins with two ends, and two follow each document; `places` [n] are the
    indices of the encoded symbols: each document's characters and its first end."""

    ids: np.ndarray
    places: np.ndarray

    @property
    def paid(self) -> np.ndarray:
        """The encoded symbols, [n]."""
        return self.ids[self.places]

    def context(self, length: int) -> np.ndarray:
        """The `length` symbols before each of `places`, in one number: [n]."""
        key = np.zeros(self.places.shape, np.uint64)
        for distance in range(length, 0, -1):
            key = key << _BITS | self.ids[self.places - distance]
        return key


def _stream(documents: Sequence[str]) -> Stream:
    text = "".join(f"\0\0{document}" for document in documents) + "\0\0"
    ids = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.uint64)
    second_ends = np.cumsum([1, *(len(document) + 2 for document in documents)])
    ids[second_ends] = ids[second_ends - 1] = _END
    is_paid = np.ones(len(ids), bool)
    is_paid[0] = False
    is_paid[second_ends] = False
    return Stream(ids, np.flatnonzero(is_paid))


def _count(context: np.ndarray, following: np.ndarray) -> Counts:
    grams, gram_counts = np.unique(context << _BITS | following, return_counts=True)
    # Grams are sorted, so those of one context are neighbors.
    contexts, first, successors = np.unique(grams >> _BITS, return_index=True, return_counts=True)
    return Counts(grams, gram_counts, contexts, np.add.reduceat(gram_counts, first), successors)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`values` at the indices of the wanted keys in the sorted `keys`; 0 for missing ones."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def _joined(documents: Sequence[str]) -> bytes:
    return b"".join(document.encode() + _END_BYTE for document in documents)


def _bytes_of(documents: Sequence[str]) -> int:
    size = sum(len(document.encode()) for document in documents)
    if not size:
        raise ValueError("held_out holds no text: bits per byte need at least one byte")
    return size


def _compressed_size(data: bytes) -> int:
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME))
