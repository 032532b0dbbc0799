"""Bad words for W5: found as words, not as pieces of other words."""

from __future__ import annotations

import functools
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from ctllm_jax.config.errors import UserError
from data_prep.rules import normalize
from data_prep.rules.view import segment

_LATIN = re.compile("[a-z0-9]")
logger = logging.getLogger(__name__)


class BadWords:
    """Finds the lines of a measured, lower-cased text that hold one of the words.

    Where a word begins or ends with a Latin letter or a digit, no other one may stand beside it (ass is not in class).
    Where it begins or ends with any other character, a segmented word of the line must begin or end there too
    (做爱 is not in 做爱心早餐). Words of one character are left out: 性 or 奶 alone says nothing.
    """

    def __init__(self, words: Iterable[str]):
        normal = {normalize.normalize_punctuation(unicodedata.normalize("NFKC", word)).lower().strip()
                  for word in words}
        self.words = sorted(word for word in normal if len(word) > 1)
        self._pattern = re.compile(_one_of(self.words)) if self.words else None

    def lines(self, text: str) -> set[int]:
        """Numbers (from 0) of the lines of `text` that hold a bad word."""
        found: set[int] = set()
        if self._pattern is None:
            return found
        number = counted = line_end = 0
        for match in self._pattern.finditer(text):
            if match.start() < line_end:
                continue
            number += text.count("\n", counted, match.start())
            counted = match.start()
            line_end = text.find("\n", counted)
            line_end = len(text) if line_end < 0 else line_end
            if self._holds(text[text.rfind("\n", 0, counted) + 1:line_end]):
                found.add(number)
        return found

    def _holds(self, line: str) -> bool:
        edges = None
        for word in self.words:
            start = line.find(word)
            while start >= 0:
                if edges is None:
                    edges = {0, *accumulate(map(len, segment(line)))}
                if _ends_at(line, start, start - 1, start, edges) and \
                        _ends_at(line, start + len(word) - 1, start + len(word), start + len(word), edges):
                    return True
                start = line.find(word, start + 1)
        return False


def _ends_at(line: str, inside: int, beside: int, edge: int, edges: set[int]) -> bool:
    """Whether a word that has the character `inside` at one end, and `beside` after it, ends there at `edge`."""
    if _LATIN.match(line[inside]):
        return not 0 <= beside < len(line) or not _LATIN.match(line[beside])
    return edge in edges


def _one_of(words: Sequence[str]) -> str:
    """A pattern that matches where one of the sorted words starts: by first characters, so that a miss is cheap."""
    by_first: dict[str, list[str]] = {}
    for word in words:
        by_first.setdefault(word[0], []).append(word[1:])
    return "|".join(f"{re.escape(first)}(?:{'|'.join(map(re.escape, rest))})" for first, rest in by_first.items())


def load(files: Sequence[str]) -> BadWords | None:
    """The bad words of UTF-8 files with one a line (# starts a comment); None without files. One copy a process."""
    return load_files(tuple(files)) if files else None


@functools.lru_cache(maxsize=4)
def load_files(files: tuple[str, ...]) -> BadWords:
    """The words of all these files; read once in a process."""
    words: list[str] = []
    for file in files:
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"filter.bad_words: {file}: {error}; a UTF-8 file with a word a line is needed") from None
        words += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    bad = BadWords(words)
    logger.info("bad words: %d; %d of one character are left out", len(bad.words), len(set(words)) - len(bad.words))
    return bad
