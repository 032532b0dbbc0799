"""Sorted runs of tokenized documents, merged with a bounded number of open files.

A run is two files: NAME.npy, an array of INDEX in the order of its keys, and NAME.ids, the ids of these documents one
after the other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ctllm_jax.config.errors import UserError

INDEX = np.dtype([("key", "<u8"), ("split", "<u8"), ("tokens", "<i8"), ("text_bytes", "<i8")])
"""A document of a run: its place in the order, its place in the split, its length without EOD."""
MOST = 56
"""Runs that are open at once; with a worker's other files fewer than 64."""


class Run(NamedTuple):
    """Some documents of a run, next to each other: the path of its .npy file, the first document, how many (None: all
    that follow), and the number of ids before them."""

    index: str
    first: int = 0
    count: int | None = None
    token: int = 0


class Merged(NamedTuple):
    """Documents of several runs in the order of their keys, those of one key in the order of the runs: INDEX
    [documents], the run of each, and where its ids begin there."""

    index: np.ndarray
    run: np.ndarray
    start: np.ndarray


def read_index(folder: Path, run: Run) -> np.ndarray:
    """The INDEX of a run; nothing else of the file is read."""
    with open(folder / run.index, "rb") as file:
        np.lib.format.read_magic(file)
        (length,), _, _ = np.lib.format.read_array_header_1_0(file)
        file.seek(run.first * INDEX.itemsize, os.SEEK_CUR)
        return np.fromfile(file, INDEX, length - run.first if run.count is None else run.count)


def merged(folder: Path, runs: Sequence[Run]) -> Merged:
    """The documents of these runs."""
    indexes = [read_index(folder, run) for run in runs]
    index = np.concatenate(indexes)
    starts = np.concatenate([run.token + np.cumsum(own["tokens"]) - own["tokens"]
                             for run, own in zip(runs, indexes, strict=True)])
    order = np.argsort(index["key"], kind="stable")
    return Merged(index[order], np.repeat(np.arange(len(runs)), list(map(len, indexes)))[order], starts[order])


def read_ids(folder: Path, runs: Sequence[Run], documents: Merged, *, dtype: str) -> Iterator[np.ndarray]:
    """The ids of these documents, each read by itself: no byte of another document is."""
    size = np.dtype(dtype).itemsize
    with ExitStack() as stack:
        files = []
        for run in runs:
            files.append(os.open((folder / run.index).with_suffix(".ids"), os.O_RDONLY))
            stack.callback(os.close, files[-1])
        for tokens, run, start in zip(documents.index["tokens"].tolist(), documents.run.tolist(),
                                      documents.start.tolist(), strict=True):
            data = os.pread(files[run], tokens * size, start * size)
            if len(data) != tokens * size:
                path = folder / runs[run].index
                raise UserError(f"{path} and its .ids file do not agree: remove {path.parent.parent} and run the same "
                                f"command again")
            yield np.frombuffer(data, dtype)


def merge(folder: Path, runs: Sequence[Run], index: Path, ids: Path, *, dtype: str) -> int:
    """Write these runs as one; gives the number of documents."""
    documents = merged(folder, runs)
    with open(ids, "wb") as file:
        for tokens in read_ids(folder, runs, documents, dtype=dtype):
            file.write(tokens)
    with open(index, "wb") as file:
        np.save(file, documents.index)
    return len(documents.index)


def groups(count: int) -> list[range]:
    """Which of `count` runs are merged together; the groups are about as long as one another."""
    number = -(-count // MOST)
    return [range(place * count // number, (place + 1) * count // number) for place in range(number)]
