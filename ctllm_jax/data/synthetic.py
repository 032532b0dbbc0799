"""Random packed documents: batches without data files. Needs only numpy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ctllm_jax.data.batch import Batch, checked_rows, stack_rows

EOD_ID = 0


class SyntheticData:
    """Documents of random length whose tokens follow Zipf's law, so that a loss falls from ln V towards `entropy`.

    Ids run from 0, the end of a document, to `vocab_size` - 1. Every row is a pure function of (seed, step, row).
    """

    tokenizer_path = None
    token_bytes = None
    eod_id = EOD_ID

    def __init__(self, *, sequence_length: int, rows: int, seed: int, vocab_size: int, isolate_documents: bool = True,
                 mask_eod: bool = True):
        if vocab_size < 2:
            raise ValueError(f"vocab_size={vocab_size} must be at least 2: one id ends documents")
        self._sequence_length = sequence_length
        self._rows = rows
        self._seed = seed
        self._vocab_size = vocab_size
        self._isolate_documents = isolate_documents
        self._mask_eod = mask_eod
        shares_V = 1.0 / np.arange(1, vocab_size)
        self._cumulative_V = np.cumsum(shares_V / shares_V.sum())
        self._mean_document = max(2, sequence_length // 4)

    @property
    def entropy(self) -> float:
        """Nats per token inside a document: a lower bound of the loss of any model."""
        shares_V = np.diff(self._cumulative_V, prepend=0.0)
        return float(-(shares_V * np.log(shares_V)).sum())

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that the batches depend on, as JSON."""
        return {"kind": "synthetic", "seed": self._seed, "vocab_size": self._vocab_size,
                "sequence_length": self._sequence_length, "rows": self._rows,
                "isolate_documents": self._isolate_documents, "mask_eod": self._mask_eod}

    def row(self, step: int, row: int) -> Batch:
        """One row of one step: a `Batch` of [S] arrays."""
        length = self._sequence_length
        generator = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, row, step]))
        drawn = np.searchsorted(self._cumulative_V, generator.random(length + 1), side="right")
        stream = np.minimum(drawn + 1, self._vocab_size - 1).astype(np.int32)
        is_end = generator.random(length + 1) < 1 / self._mean_document
        stream[is_end] = EOD_ID
        tokens_S, is_end_S = stream[:-1], is_end[:-1]
        places_S = np.arange(length, dtype=np.int32)
        if self._isolate_documents:
            starts_S = np.concatenate([[True], is_end_S[:-1]])
            segment_ids_S = np.cumsum(starts_S, dtype=np.int32)
            positions_S = places_S - np.maximum.accumulate(np.where(starts_S, places_S, 0))
        else:
            segment_ids_S, positions_S = np.ones(length, np.int32), places_S
        weights_S = np.where(is_end_S & self._mask_eod, 0, 1).astype(np.float32)
        return Batch(tokens_S, stream[1:], weights_S, segment_ids_S, positions_S.astype(np.int32))

    def iterate(self, start_step: int, *, local_rows: Sequence[int]) -> Iterator[Batch]:
        """Batches of these rows from data step `start_step` on, without end."""
        local = checked_rows(local_rows, self._rows)

        def batches():
            step = start_step
            while True:
                yield stack_rows([self.row(step, int(row)) for row in local])
                step += 1

        return batches()

    def held_out(self, *, rows: int, split: str, max_tokens: int) -> dict[str, Iterable[Batch]]:
        """None: synthetic data has no epochs."""
        del rows, split, max_tokens
        return {}

    def tokens_per_source(self, steps: int) -> dict[str, int]:
        """Tokens drawn in the first `steps` steps."""
        return {"synthetic": steps * self._rows * self._sequence_length}

    def tokens_at(self, steps: int) -> int:
        """Tokens of the first `steps` steps; there is no padding."""
        return steps * self._rows * self._sequence_length

    def epochs(self, steps: int) -> dict[str, float]:
        """Zero, because no row is repeated."""
        return {"synthetic": 0.0}
