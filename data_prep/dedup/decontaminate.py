"""Find evaluation text in documents: n-grams of characters that both hold.

Both sides are normalised alike: NFKC, lower case, without white space, punctuation and control characters (Unicode's
categories Z, P, C). What is left of an evaluation set's strings is kept as a sorted array of 64-bit hashes.
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

SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".zip")
LEFT_OUT = ("Z", "P", "C")


class NgramSet:
    """The distinct n-grams of evaluation text."""

    def __init__(self, hashes: np.ndarray, ngram: int):
        """uint64 [count] hashes in any order, as often as they like; characters of an n-gram."""
        self.hashes = np.unique(hashes)
        self.ngram = ngram
        # A table of their upper bits, eight times as many as there are: one look tells for most that they are not in.
        self._shift = np.uint64(64 - max(10, (8 * len(self.hashes)).bit_length()))
        self._table = np.zeros(1 << int(np.uint64(64) - self._shift), dtype=bool)
        self._table[self.hashes >> self._shift] = True

    def __len__(self) -> int:
        return len(self.hashes)

    def matches(self, text: str) -> int:
        """How many distinct n-grams of evaluation text a document holds."""
        if not len(self):
            return 0
        hashes = shingle_hashes(normalize(text), self.ngram)
        hashes = np.unique(hashes[self._table[hashes >> self._shift]])
        places = np.minimum(np.searchsorted(self.hashes, hashes), len(self) - 1)
        return int((self.hashes[places] == hashes).sum())


def load(files: Iterable[str | Path], *, ngram: int = 13) -> NgramSet:
    """The n-grams of every string value of evaluation sets that is long enough for one.

    `files` are JSONL, JSON, CSV, plain text, .zip archives of these, and folders, of which every such file is taken.
    UserError where one is missing, of another kind or malformed (with its line), or where no string is long enough.
    """
    parts, values = [], 0
    for name in files:
        for label, data in _members(Path(name)):
            for value in _strings(label, data):
                values += 1
                parts.append(shingle_hashes(normalize(value), ngram))
    hashes = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)
    if values and not len(hashes):
        raise UserError(f"decontaminate.files: none of their {values} strings has {ngram} characters; "
                        f"decontaminate.ngram={ngram} is too long for them")
    return NgramSet(hashes, ngram)


def normalize(text: str) -> str:
    """What is compared: NFKC, lower case, without white space, punctuation and control characters."""
    text = unicodedata.normalize("NFKC", text).lower()
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return points[_kept_points()[points]].tobytes().decode("utf-32-le", "surrogatepass")


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
    """Every string value of one file, by the kind that its name tells."""
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
