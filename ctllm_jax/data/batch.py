"""What a training step is given: the batch, and whoever makes batches.

B rows, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


class Preference(NamedTuple):
    """What is known of the answers of a row, numpy or jax arrays, all [B, M]: segment i of a row stands at i - 1.

    pair_ids int32, the same for both answers of a pair, which lie in one row; 0 for segments that do not exist.
    is_chosen bool; group int32, an index into the names of groups; reference_logps float32, the sum of log p over the
    answer's tokens under the reference model, 0 where there is none.
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
    """int32 [vocabulary of the tokenizer]: UTF-8 bytes that each id stands for, 0 for control ids."""
    eod_id: int | None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the order and the content of the batches depend on, as JSON."""

    def iterate(self, start_step: int, *, local_rows: Sequence[int]) -> Iterator[Batch]:
        """Numpy batches of these rows of the global batch, for data step `start_step` and on, without end.

        Rows do not depend on which others are asked for. Close the iterator (`.close()`) to stop its threads.
        """

    def held_out(self, *, rows: int, split: str, max_tokens: int) -> dict[str, Iterable[Batch]]:
        """For each source, batches [rows, S] that training does not see; each can be iterated again and again.

        The last batch is filled up with rows of segment 0. `split` names what is held out, where the source has splits;
        about `max_tokens` tokens of a source are read, but at least one row: of text from the start of the split, whose
        documents are in random order; of dialogues and pairs a random sample. Empty where nothing is held out.
        """

    def tokens_per_source(self, steps: int) -> dict[str, int]:
        """Tokens (rows times S, padded tails included) drawn from each source in the first `steps` steps."""

    def tokens_at(self, steps: int) -> int:
        """Tokens of the first `steps` steps without the padding; of a stream's rows only the last of a shard has any,
        which is not taken out."""

    def epochs(self, steps: int) -> dict[str, float]:
        """How often each source has been seen through after `steps` steps."""


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """Rows with [S] arrays to one batch with [B, S] arrays."""
    batch = Batch(*(np.stack(arrays) for arrays in list(zip(*rows, strict=True))[:5]))
    if rows[0].preference is None:
        return batch
    parts = zip(*(row.preference for row in rows), strict=True)
    return batch._replace(preference=Preference(*(np.stack(arrays) for arrays in parts)))


def padding_row(sequence_length: int) -> Batch:
    """A row of nothing but padding: segment 0, loss weight 0."""
    zeros_S = np.zeros(sequence_length, np.int32)
    return Batch(zeros_S, zeros_S, np.zeros(sequence_length, np.float32), zeros_S, zeros_S)


def checked_rows(local_rows: Sequence[int], rows: int) -> np.ndarray:
    """`local_rows` as int64 [n]; ValueError where one is not a row of a global batch of `rows`."""
    checked = np.asarray(local_rows, np.int64)
    if checked.ndim != 1 or not len(checked) or checked.min() < 0 or checked.max() >= rows:
        raise ValueError(f"local_rows={list(local_rows)!r} must be one or more of the rows 0..{rows - 1}")
    return checked
