"""Find evaluation text in documents: passages of characters that both hold.

Both sides are normalised alike: NFKC, lower case, simplified characters, without white space, punctuation and control
characters (Unicode's categories Z, P, C). What is left of an evaluation set's strings is kept as a sorted array of the
64-bit hashes of its n-grams.

A passage is a run of places of a document at each of which an n-gram of the evaluation sets begins. Its weight is its
number of characters, of which those up to U+02FF (ASCII, Latin) count a quarter: about five letters make a word, and
13 of them occur everywhere ("computerscience"). Evaluation text is a passage longer than one n-gram (Latin characters
count a quarter), or a whole string of the evaluation sets with at least three quarters of that length. N-grams of few
different characters (0000000000000) are no evidence.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import sys
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.folders import files_below
from data_prep.dedup.minhash import CODE_POINTS, shingle_hashes
from data_prep.rules.normalize import simplify

SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".zip")
LEFT_OUT = ("Z", "P", "C")
LATIN = 0.25
"""Weight of a character up to U+02FF."""
WHOLE = 0.75
"""Smallest weight of a string that counts if it occurs as a whole, as a share of the n-gram."""
FEWEST_CHARACTERS = 0.4
"""Least share of different characters in an n-gram."""


class NgramSet:
    """The distinct n-grams of evaluation strings, and which of them begin a short string."""

    def __init__(self, strings: Iterable[str], ngram: int):
        """Normalized strings; characters of an n-gram."""
        self.ngram = ngram
        parts, starts = [np.zeros(0, dtype=np.uint64)], {}
        for text in strings:
            parts.append(hashes := shingle_hashes(text, ngram))
            if ngram <= len(text) <= ngram / LATIN and WHOLE * ngram <= weight_of(text) <= ngram:
                starts[int(hashes[0])] = min(len(text), starts.get(int(hashes[0]), len(text)))
        self.hashes = np.unique(np.concatenate(parts))
        self._starts = starts
        # A table of their upper bits with eight times as many entries: one lookup rules out most n-grams.
        self._shift = np.uint64(64 - max(10, (8 * len(self.hashes)).bit_length()))
        self._table = np.zeros(1 << int(np.uint64(64) - self._shift), dtype=bool)
        self._table[self.hashes >> self._shift] = True

    def __len__(self) -> int:
        return len(self.hashes)

    def passages(self, text: str) -> list[str]:
        """The different passages of evaluation text in a document, as they are compared, in their order."""
        if not len(self):
            return []
        text = normalize(text)
        hashes = shingle_hashes(text, self.ngram)
        places = np.flatnonzero(self._table[hashes >> self._shift])
        found = np.minimum(np.searchsorted(self.hashes, hashes[places]), len(self) - 1)
        places = [place for place in places[self.hashes[found] == hashes[places]].tolist()
                  if len(set(text[place:place + self.ngram])) >= FEWEST_CHARACTERS * self.ngram]
        passages: dict[str, None] = {}
        begin = 0
        for end in range(1, len(places) + 1):
            if end < len(places) and places[end] == places[end - 1] + 1:
                continue
            first, stop = places[begin], places[end - 1] + self.ngram
            if weight_of(text[first:stop]) > self.ngram or any(
                    self._starts.get(int(hashes[place]), stop + 1) <= stop - place for place in places[begin:end]):
                passages[text[first:stop]] = None
            begin = end
        return list(passages)


def weight_of(text: str) -> float:
    """The length of a normalized text in equivalent Chinese characters."""
    return len(text) - (1 - LATIN) * sum(character <= "\u02ff" for character in text)


def load(files: Iterable[str | Path], *, ngram: int = 13) -> NgramSet:
    """The n-grams of every string value of evaluation sets that is long enough for one.

    `files` are JSONL, JSON, CSV, plain text, .zip archives of these, and folders, of which every such file is taken.
    UserError where one is missing, of another kind or malformed (with its line), or where no string is long enough.
    """
    values = [normalize(value) for name in files for label, data in _members(Path(name))
              for value in _strings(label, data)]
    found = NgramSet(values, ngram)
    if values and not len(found):
        raise UserError(f"decontaminate.files: none of their {len(values)} strings has {ngram} characters; "
                        f"decontaminate.ngram={ngram} is too long for them")
    return found


def normalize(text: str) -> str:
    """Normalize for comparison: NFKC, lower case, simplified, without white space, punctuation and control
    characters."""
    text = unicodedata.normalize("NFKC", text).lower()
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return simplify(points[_kept_points()[points]].tobytes().decode("utf-32-le"))


@functools.cache
def _kept_points() -> np.ndarray:
    """bool [CODE_POINTS]: whether a character counts."""
    return np.fromiter((unicodedata.category(chr(point))[0] not in LEFT_OUT for point in range(CODE_POINTS)),
                       dtype=bool, count=CODE_POINTS)


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """`(name, content)` of a file, of each file of a folder, or of each in a .zip archive."""
    if path.is_dir():
        found = [file for file in files_below(path) if file.suffix.lower() in SUFFIXES]
        if not found:
            raise UserError(f"decontaminate.files: {path} has no {', '.join(SUFFIXES)}")
        for file in found:
            yield from _members(file)
        return
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"decontaminate.files: cannot read {path}: {error.strerror}") from None
    if path.suffix.lower() != ".zip":
        yield str(path), data
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inside = [name for name in archive.namelist() if PurePosixPath(name).suffix.lower() in SUFFIXES[:-1]]
            if not inside:
                raise UserError(f"decontaminate.files: {path} has no {', '.join(SUFFIXES[:-1])}")
            for name in inside:
                yield f"{path}:{name}", archive.read(name)
    except (zipfile.BadZipFile, RuntimeError) as error:  # RuntimeError: a password is needed.
        raise UserError(f"decontaminate.files: cannot read {path}: {error}") from None


def _strings(label: str, data: bytes) -> Iterator[str]:
    """Every string value of one file, parsed by its suffix."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        try:
            text = data.decode("gb18030")
        except UnicodeDecodeError:
            raise UserError(f"decontaminate.files: {label} is neither UTF-8 nor GB18030") from None
    suffix = PurePosixPath(label).suffix.lower()
    if suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield from _values(_parsed(line, f"{label}, line {number}"))
    elif suffix == ".json":
        yield from _values(_parsed(text, label))
    elif suffix == ".csv":
        csv.field_size_limit(sys.maxsize)
        for row in csv.reader(io.StringIO(text, newline="")):
            yield from row
    elif suffix == ".txt":
        yield from text.splitlines()
    else:
        raise UserError(f"decontaminate.files: {label} is of no kind that is read: {', '.join(SUFFIXES)}")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"decontaminate.files: {place}: not JSON: {error}") from None


def _values(value: Any) -> Iterator[str]:
    """Every string inside a JSON value; keys are names, not text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _values(item)
