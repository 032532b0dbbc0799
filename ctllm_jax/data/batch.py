"""The input of a training step: batches, and the interface of their sources.

B rows, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


class Preference(NamedTuple):
    """The answers of each row, numpy or jax arrays, all [B, M]: segment i of a row has index i - 1.

    pair_ids int32, the same for both answers of a pair, which are in one row; 0 for segments that do not exist.
    is_chosen bool; group int32, an index into the names of groups; reference_logps float32, the sum of log p over the
    answer's tokens under the reference model, 0 if there is none.
    """

    pair_ids: Any
    is_chosen: Any
    group: Any
    reference_logps: Any


class Batch(NamedTuple):
    """Rows of packed documents, numpy or jax arrays, all [B, S].

    tokens int32; targets int32, the token after each; loss_weights float32, 0 where the target does not count;
    segment_ids int32, 1 and up for the documents of a row, 0 for padding; positions int32, from 0 in each segment.
    `preference` is a `Preference` where answers are compared, else None.
    """

    tokens: Any
    targets: Any
    loss_weights: Any
    segment_ids: Any
    positions: Any
    preference: Any = None


class BatchSource(Protocol):
    """Batches as a pure function of (seed, data step, row): nothing to save, nothing to restore."""

    tokenizer_path: Path | None
    token_bytes: np.ndarray | None
    """int32 [vocabulary of the tokenizer]: number of UTF-8 bytes of each id, 0 for control ids."""
    eod_id: int | None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that the order and content of the batches depend on, as JSON."""

    def iterate(self, start_step: int, *, local_rows: Sequence[int]) -> Iterator[Batch]:
        """Yield numpy batches of these rows of the global batch, from data step `start_step`, without end.

        A row does not depend on which other rows are requested. Close the iterator (`.close()`) to stop its threads.
        """

    def held_out(self, *, rows: int, split: str, max_tokens: int) -> dict[str, Iterable[Batch]]:
        """For each source, held-out batches [rows, S]; each can be iterated repeatedly.

        The last batch is filled up with rows of segment 0. `split` names the held-out split of sources with splits.
        About `max_tokens` tokens of each source are read, but at least one row: from the start of a text split, whose
        documents are in random order, and as a random sample of dialogues and pairs. Empty if nothing is held out.
        """

    def tokens_per_source(self, steps: int) -> dict[str, int]:
        """Tokens (rows times S, padded tails included) drawn from each source in the first `steps` steps."""

    def tokens_at(self, steps: int) -> int:
        """Tokens of the first `steps` steps without padding. The padding of a stream, in the last row of each shard,
        counts as tokens."""

    def epochs(self, steps: int) -> dict[str, float]:
        """Number of epochs of each source after `steps` steps."""


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """Stack rows of [S] arrays to one batch of [B, S] arrays."""
    batch = Batch(*(np.stack(arrays) for arrays in list(zip(*rows, strict=True))[:5]))
    if rows[0].preference is None:
        return batch
    parts = zip(*(row.preference for row in rows), strict=True)
    return batch._replace(preference=Preference(*(np.stack(arrays) for arrays in parts)))


def padding_row(sequence_length: int) -> Batch:
    """Return a row of padding: segment 0, loss weight 0."""
    zeros_S = np.zeros(sequence_length, np.int32)
    return Batch(zeros_S, zeros_S, np.zeros(sequence_length, np.float32), zeros_S, zeros_S)


def checked_rows(local_rows: Sequence[int], rows: int) -> np.ndarray:
    """Return `local_rows` as int64 [n]. Raises ValueError if one is not a row of a global batch of `rows`."""
    checked = np.asarray(local_rows, np.int64)
    if checked.ndim != 1 or not len(checked) or checked.min() < 0 or checked.max() >= rows:
        raise ValueError(f"local_rows={list(local_rows)!r} must be one or more of the rows 0..{rows - 1}")
    return checked
