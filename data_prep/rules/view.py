"""One document as the rules see it: each view is computed once, when a rule first asks for it.

"Character" in the rules means a character of the measured text (NFKC, then U2) that is no white space: how a page's
text was laid out says nothing about it, and depends on who took it out of the HTML.
"""

from __future__ import annotations

import functools
import string
import sys
import unicodedata
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from data_prep.rules import normalize

if TYPE_CHECKING:
    from data_prep.rules.ngrams import Repetition
    from data_prep.rules.urls import Blacklist

SPACE, PUNCTUATION, DIGIT, SENTENCE_END, HASH, DOT = 1, 2, 4, 8, 16, 32
SENTENCE_ENDS = '.!?…;"'
SEGMENTED = 1000
"""Characters from the head of a document that S3 looks at; the mean over 650 words has a standard error of 0.03."""


@functools.cache
def classes() -> np.ndarray:
    """The classes of every code point as bit flags, uint8 [0x110000].

    Punctuation is Unicode category P, and the ASCII symbols; a digit is category Nd.
    """
    table = np.zeros(sys.maxunicode + 1, np.uint8)
    for code in range(0x20000):
        if 0x3400 <= code < 0xA000 or 0xAC00 <= code < 0xE000:
            continue
        character = chr(code)
        category = unicodedata.category(character)
        table[code] |= SPACE * (character.isspace() or character == "\u200b" or character == "\ufeff")
        table[code] |= PUNCTUATION * (category[0] == "P" or character in string.punctuation)
        table[code] |= DIGIT * (category == "Nd")
    for character in SENTENCE_ENDS:
        table[ord(character)] |= SENTENCE_END
    table[ord("#")] |= HASH
    table[[ord("."), ord("…")]] |= DOT
    return table


@functools.cache
def punctuation() -> frozenset[str]:
    """Every character that is punctuation or white space."""
    return frozenset(map(chr, np.flatnonzero(classes() & (PUNCTUATION | SPACE)).tolist()))


@functools.cache
def _cut():
    from ctllm_jax.config.errors import UserError

    try:
        import rjieba
    except ImportError:
        raise UserError("word segmentation needs the package rjieba: pip install 'ctllm-jax[prep]'") from None
    return rjieba.cut


def segment(text: str) -> list[str]:
    """The words of a text, in order and without gaps (rjieba, with its model for unknown words)."""
    return _cut()(text)


class View:
    """The views of one text without lone surrogates.

    `text` is what is left after the removal of links, `raw` what was read (the same, if not given); `identify` gives
    label and score of a text, `languages` are the labels that are kept (none: any).
    """

    def __init__(self, text: str, *, raw: str | None = None, url: str | None = None, blacklist: Blacklist | None = None,
                 identify: Callable[[str], tuple[str, float]] | None = None, languages: Sequence[str] = ()):
        self.text, self.raw, self.url, self.blacklist = text, text if raw is None else raw, url, blacklist
        self.languages, self._identify = tuple(languages), identify

    @cached_property
    def language(self) -> tuple[str, float]:
        """Label and score of the raw text's language; ("", 0.0) without a language model."""
        return self._identify(self.raw) if self._identify else ("", 0.0)

    @cached_property
    def measured_codes(self) -> np.ndarray:
        """Code points of the measured text, white space included, uint32."""
        return normalize.measured_code_points(self.text)

    @cached_property
    def measured(self) -> str:
        """The measured text: U2(NFKC(text)). Its lines are the lines of the text."""
        return normalize.from_code_points(self.measured_codes)

    @cached_property
    def lowered(self) -> str:
        """The measured text in lower case; its lines are still those of the text."""
        return self.measured.lower()

    @cached_property
    def _all_flags(self) -> np.ndarray:
        return classes()[self.measured_codes]

    @cached_property
    def _kept(self) -> np.ndarray:
        return (self._all_flags & SPACE) == 0

    @cached_property
    def codes(self) -> np.ndarray:
        """Code points of the characters, uint32 [length]."""
        return self.measured_codes[self._kept]

    @cached_property
    def flags(self) -> np.ndarray:
        """Class bits of the characters, uint8 [length]."""
        return self._all_flags[self._kept]

    @property
    def length(self) -> int:
        """Number of characters."""
        return len(self.codes)

    @cached_property
    def repetition(self) -> Repetition:
        """The n-grams of the characters that occur more than once, and how often each character occurs."""
        from data_prep.rules.ngrams import repetition

        return repetition(self.codes)

    @cached_property
    def lines(self) -> list[str]:
        """Lines of the text that hold more than white space, stripped."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def measured_lines(self) -> list[str]:
        """Lines of the measured text that hold more than white space, stripped."""
        return [line for line in map(str.strip, self.measured.split("\n")) if line]

    @cached_property
    def segmented(self) -> list[str]:
        """Words of the first `SEGMENTED` characters of the text (rjieba), punctuation and white space left out."""
        marks = punctuation()
        return [word for word in segment(self.text[:SEGMENTED]) if word not in marks]

    @cached_property
    def spaced_words(self) -> list[str]:
        """The measured text split at white space: the words of English."""
        return self.measured.split()

    @cached_property
    def shared(self) -> dict:
        """What several rules of a module compute in common."""
        return {}
