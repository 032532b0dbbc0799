"""One document as the rules see it: each view is computed once, when a rule first asks for it.

"Character" in the rules means a character of the measured text (NFKC, then U2) that is no white space: how a page's
text was laid out says nothing about it, and depends on who took it out of the HTML. For the same reason the measured
text has no invisible characters and no separators (`normalize.without_separators`).
"""

from __future__ import annotations

import functools
import string
import sys
import unicodedata
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from data_prep.rules import normalize
from data_prep.rules.blacklist import Blacklist
from data_prep.rules.repetition import Repetition, repetition

SPACE, PUNCTUATION, DIGIT, SENTENCE_END, HASH, DOT, RARE, INVISIBLE = (1 << bit for bit in range(8))
SENTENCE_ENDS = '.!?…;"'
_FILLERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u2800\u3164\uffa0"
                     + "".join(map(chr, [*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)])))
"""Invisible characters that Unicode counts as letters, marks or symbols."""
SEGMENTED = 1000
"""Characters from the head of a document that S3 looks at; the mean over 650 words has a standard error of 0.03."""


@functools.cache
def classes() -> np.ndarray:
    """The classes of every code point as bit flags, uint8 [0x110000].

    Punctuation is Unicode category P, and the ASCII symbols; a digit is category Nd. Invisible are controls, format
    characters, private use, variation selectors and fillers. Rare is what wrongly decoded text is full of: letters of
    Latin-1, and Chinese characters that are not among the 3,755 most common ones of GB2312.
    """
    table = np.zeros(sys.maxunicode + 1, np.uint8)
    table[0xF0000:0xFFFFE] |= INVISIBLE
    table[0x100000:0x10FFFE] |= INVISIBLE
    table[0xC0:0x100] |= RARE
    table[0x3400:0xA000] |= RARE
    common = bytes(byte for lead in range(0xB0, 0xD8) for trail in range(0xA1, 0xFF) for byte in (lead, trail))
    table[normalize.code_points(common.decode("gb2312", "ignore"))] &= ~RARE & 0xFF
    for code in (*range(0x20000), *range(0xE0000, 0xE1000)):
        if 0x3400 <= code < 0xA000 or 0xAC00 <= code < 0xE000:
            continue
        character = chr(code)
        category = unicodedata.category(character)
        invisible = category in ("Cf", "Co") or category == "Cc" and not character.isspace() or character in _FILLERS
        table[code] |= INVISIBLE * invisible
        table[code] |= SPACE * (character.isspace() or character == "\u200b" or character == "\ufeff")
        table[code] |= PUNCTUATION * (category[0] == "P" or character in string.punctuation)
        table[code] |= DIGIT * (category == "Nd")
    for character in SENTENCE_ENDS:
        table[ord(character)] |= SENTENCE_END
    table[ord("\n")] |= SENTENCE_END
    table[ord("#")] |= HASH
    table[[ord("."), ord("…")]] |= DOT
    return table


@functools.cache
def punctuation() -> frozenset[str]:
    """Every character that is punctuation or white space."""
    return frozenset(map(chr, np.flatnonzero(classes() & (PUNCTUATION | SPACE)).tolist()))


@functools.cache
def trailing() -> frozenset[str]:
    """Every character that may follow a sentence's last mark: closing brackets and quotes, pictures, white space."""
    found = {chr(code) for code in range(0x20000) if unicodedata.category(chr(code)) in ("Pe", "Pf", "So", "Sk", "Me")
             or chr(code).isspace()}
    return frozenset(found.union(")]}>'~*_^") - {"\ufffd"})


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


class _Measurement(NamedTuple):
    """The measured text with its code points and class bits, and whether it lost invisible characters, separators."""

    codes: np.ndarray
    flags: np.ndarray
    text: str
    hidden: bool
    separators: bool


class View:
    """The views of one text without lone surrogates.

    `text` is what is left after the removal of links, `raw` what was read (the same, if not given); `identify` gives
    label and score of a text, `languages` are the labels that are kept (none: any). `published`: measure as CT-LLM
    describes it, also where that fails clean text (each rule says what differs).
    """

    def __init__(self, text: str, *, raw: str | None = None, url: str | None = None, blacklist: Blacklist | None = None,
                 identify: Callable[[str], tuple[str, float]] | None = None, languages: Sequence[str] = (),
                 published: bool = False):
        self.text, self.raw, self.url, self.blacklist = text, text if raw is None else raw, url, blacklist
        self.published = published
        self.languages, self._identify = tuple(languages), identify

    @cached_property
    def language(self) -> tuple[str, float]:
        """Label and score of the raw text's language; ("", 0.0) without a language model."""
        if not self._identify:
            return "", 0.0
        return self._identify(normalize.without_separators(self.raw) if self._measurement.separators else self.raw)

    @cached_property
    def _measurement(self) -> _Measurement:
        codes = normalize.measured_code_points(self.text)
        flags, hidden, separators = classes()[codes], False, False
        if not self.published:
            if hidden := bool(len(flags) and flags.max() >= INVISIBLE):
                visible = flags < INVISIBLE
                codes, flags = codes[visible], flags[visible]
        text = normalize.from_code_points(codes)
        if not self.published:
            cleaned = normalize.without_separators(text, codes)
            if separators := cleaned is not text:
                text, codes = cleaned, normalize.code_points(cleaned)
                flags = classes()[codes]
        return _Measurement(codes, flags, text, hidden, separators)

    @property
    def all_flags(self) -> np.ndarray:
        """Class bits of the measured text, white space included, uint8."""
        return self._measurement.flags

    @property
    def measured(self) -> str:
        """The measured text: U2(NFKC(text)), without separators and invisible characters. Its lines are the text's."""
        return self._measurement.text

    @property
    def hidden(self) -> bool:
        """Whether invisible characters were left out of the measured text."""
        return self._measurement.hidden

    @cached_property
    def lowered(self) -> str:
        """The measured text in lower case; its lines are still those of the text."""
        return self.measured.lower()

    @cached_property
    def _kept(self) -> np.ndarray:
        return (self.all_flags & SPACE) == 0

    @cached_property
    def codes(self) -> np.ndarray:
        """Code points of the characters, uint32 [length]."""
        return self._measurement.codes[self._kept]

    @cached_property
    def flags(self) -> np.ndarray:
        """Class bits of the characters, uint8 [length]."""
        return self.all_flags[self._kept]

    @property
    def length(self) -> int:
        """Number of characters."""
        return len(self.codes)

    @cached_property
    def repetition(self) -> Repetition:
        """The n-grams of the characters that occur more than once, and how often each character occurs."""
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
        """Words of the first `SEGMENTED` characters (rjieba), punctuation and white space left out.

        The characters are those of the measured text; published: of the text.
        """
        marks = punctuation()
        return [word for word in segment((self.text if self.published else self.measured)[:SEGMENTED])
                if word not in marks]

    @cached_property
    def spaced_words(self) -> list[str]:
        """The measured text split at white space: the words of English."""
        return self.measured.split()

    @cached_property
    def shared(self) -> dict:
        """What several rules of a module compute in common."""
        return {}
