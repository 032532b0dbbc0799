"""Pack items of some length, such as dialogues or pairs, into rows without splitting them, epoch by epoch.

B rows of a batch, N items, R rows of an epoch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Packing(NamedTuple):
    """The row of each item, from the longest to the shortest: int64 [N]; and the number of rows."""

    row_of_rank: np.ndarray
    rows: int


def best_fit(lengths: Sequence[int], capacity: int, *, most: int | None = None) -> Packing:
    """Pack by best-fit decreasing: each length, in falling order, goes to the fullest row that still has room for it.

    `lengths` must be in falling order, and none may be above `capacity`; `most` is the number of items that a row may
    hold. Only the lengths matter, so items of equal length can be permuted afterwards.
    """
    rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit n: some row has room for exactly n more
    row_of_rank, rows = np.empty(len(lengths), np.int64), 0
    held = np.zeros(len(lengths), np.int64)
    for rank, length in enumerate(map(int, lengths)):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            room, row, rows = capacity, rows, rows + 1
        row_of_rank[rank] = row
        held[row] += 1
        left = room - length
        if left and held[row] != most:
            rows_with_room[left].append(row)
            rooms |= 1 << left
    return Packing(row_of_rank, rows)


class PackedEpochs:
    """The items of each row, as a pure function of (seed, step, row).

    Row r of data step t is row `t % steps_per_epoch * B + r` of epoch `t // steps_per_epoch`: the last batch of an
    epoch is filled up with empty rows, and no batch spans two epochs. Each epoch draws anew which items of equal length
    share rows, and the order of the rows; all epochs have the same number of rows.
    """

    def __init__(self, lengths: np.ndarray, capacity: int, *, rows: int, seed: int, most: int | None = None):
        """
        Args:
          lengths: int [N], none above `capacity`, the length of a row.
          rows: B.
          most: largest number of items in a row; None: as many as fit.
        """
        self._lengths, self._rows, self.seed = lengths, rows, seed
        packing = best_fit(np.sort(lengths)[::-1], capacity, most=most)
        by_row = np.argsort(packing.row_of_rank, kind="stable")
        counts = np.bincount(packing.row_of_rank, minlength=packing.rows)
        self._ranks_of_row = np.split(by_row, np.cumsum(counts)[:-1])
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        # A row holds items of the same lengths in every epoch; the items of equal length are drawn again.
        self._tokens_of_row = np.add.reduceat(np.sort(lengths)[::-1][by_row], np.cumsum(counts) - counts)
        self.most_in_a_row = int(counts.max())
        self.rows_per_epoch = packing.rows
        self.steps_per_epoch = -(-packing.rows // rows)

    def items(self, step: int, row: int) -> np.ndarray:
        """The items of one row of one step, int64; none after the end of an epoch."""
        epoch, step = divmod(step, self.steps_per_epoch)
        place = step * self._rows + row
        return self.items_at(epoch, place) if place < self.rows_per_epoch else np.empty(0, np.int64)

    def items_at(self, epoch: int, place: int) -> np.ndarray:
        """The items of row `place` of an epoch, int64."""
        item_of_rank, order = self._epoch(epoch)
        return item_of_rank[self._ranks_of_row[order[place]]]

    def tokens_at(self, steps: int) -> int:
        """Sum of the lengths of all items in the first `steps` steps."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        order = self._epoch(epochs)[1][:rest * self._rows] if rest else slice(0)
        return int(epochs * self._tokens_of_row.sum() + self._tokens_of_row[order].sum())

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Item of each rank, and row of each place, of an epoch; the last two epochs are cached."""
        if epoch not in self._epochs:
            # Sort by length, then by a random number of the epoch, so that ranks of equal length are drawn again.
            drawn = _random(self.seed, epoch, "dialogues", len(self._lengths))
            item_of_rank = np.lexsort((drawn, -self._lengths))
            order = np.argsort(_random(self.seed, epoch, "rows", self.rows_per_epoch), kind="stable")
            if len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = item_of_rank, order
        return self._epochs[epoch]

    def times_seen(self, steps: int) -> np.ndarray:
        """Number of occurrences of each item in the first `steps` steps, int64 [N]."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        seen = np.full(len(self._lengths), epochs, np.int64)
        for place in range(min(rest * self._rows, self.rows_per_epoch)):
            seen[self.items_at(epochs, place)] += 1
        return seen


def _random(seed: int, epoch: int, what: str, count: int) -> np.ndarray:
    """uint64 [count]; raw words, whose values NumPy guarantees across versions."""
    digest = hashlib.blake2b(json.dumps([seed, epoch, what]).encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(count)
