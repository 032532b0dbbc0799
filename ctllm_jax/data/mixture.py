"""Mix sources by weight into one endless order of rows that is computed by arithmetic alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import grain
import numpy as np

from ctllm_jax.data.batch import Batch, stack_rows

_ENDLESS = 2**62  # Grain computes with lengths, partly as floats; the largest int would overflow
_PROBED_ROWS = (*range(64), *(10**9 + row for row in range(64)))


class Interleaving:
    """The source of each row of an endless mixture, with counts in closed form.

    Of the first n rows, the first source has n minus the floor of its complement's share; the next source is computed
    in the same way from the remaining rows, and so on. The counts are exact integers, and differ from n times the share
    by at most the number of sources. Weights are used exactly, whereas Grain's `mix` rounds them to a hundredth of the
    smallest.
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(repr(float(weight))) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        parts = [int(weight * scale) for weight in exact]
        self._parts = [part // math.gcd(*parts) for part in parts]

    def counts(self, rows: int) -> list[int]:
        """Rows of each source among the first `rows`."""
        counts, left, total = [], int(rows), sum(self._parts)
        for part in self._parts:
            after = left * (total - part) // total
            counts.append(left - after)
            left, total = after, total - part
        return counts

    def place(self, row: int) -> tuple[int, int]:
        """The source of a row, and how many rows of that source come before it."""
        before, after = self.counts(row), self.counts(row + 1)
        source = next(index for index, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1])
        return source, before[source]


class LocalRows(grain.transforms.DatasetSelectionMap):
    """Position in what one process reads -> (source, position in that source's endless stream)."""

    def __init__(self, interleaving: Interleaving, *, rows: int, local_rows: np.ndarray, start_step: int):
        self._interleaving = interleaving
        self._rows = rows
        self._local_rows = local_rows
        self._start_step = start_step

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> tuple[int, int]:
        step, place = divmod(index, len(self._local_rows))
        return self._interleaving.place((self._start_step + step) * self._rows + int(self._local_rows[place]))


class Mixture:
    """Sources (name -> rows with random access) shuffled by seed, endless, a new order every epoch, mixed by weight.

    `rows` is the global batch: row r of data step t is row t * rows + r of the mixture.
    """

    def __init__(self, sources: Mapping[str, Sequence[Batch]], weights: Mapping[str, float], *, rows: int, seed: int):
        self.names = sorted(sources)
        self.sizes = {name: len(sources[name]) for name in self.names}
        self._rows = rows
        self._seed = seed
        self._interleaving = Interleaving([weights[name] for name in self.names])
        self._streams = [self._shuffled(name, grain.MapDataset.source(sources[name])) for name in self.names]

    def batches(self, *, local_rows: np.ndarray, start_step: int) -> grain.MapDataset:
        """Element i is the batch of these rows of data step `start_step` + i."""
        selection = LocalRows(self._interleaving, rows=self._rows, local_rows=local_rows, start_step=start_step)
        rows = grain.MapDataset.select_from_datasets(self._streams, selection)
        return rows.batch(len(local_rows), batch_fn=stack_rows)

    def rows_per_source(self, steps: int) -> dict[str, int]:
        """Rows drawn from each source in the first `steps` steps."""
        return dict(zip(self.names, self._interleaving.counts(steps * self._rows), strict=True))

    def order_sha256(self) -> str:
        """Hash of the sources of some early and late rows; it changes if a library changes the meaning of a seed."""
        orders = [self._shuffled(name, grain.MapDataset.range(self.sizes[name])) for name in self.names]
        places = [self._interleaving.place(row) for row in _PROBED_ROWS]
        probed = [(source, int(orders[source][position])) for source, position in places]
        return hashlib.sha256(json.dumps(probed).encode()).hexdigest()

    def _shuffled(self, name: str, dataset: grain.MapDataset) -> grain.MapDataset:
        # Grain takes seed + epoch as an epoch's seed: hashing keeps the epochs of two sources, or two runs, apart.
        digest = hashlib.blake2b(json.dumps([self._seed, name]).encode(), digest_size=4).digest()
        return dataset.shuffle(seed=int.from_bytes(digest, "little")).repeat(None)
