"""Convert a window of a token stream to one row, and a split to its rows.

S tokens of a row; a row's arrays are [S].
"""

from __future__ import annotations

import numpy as np

from ctllm_jax.config.errors import UserError
from ctllm_jax.data.batch import Batch
from ctllm_jax.dataset.reader import SplitReader, Window


def pack_row(window: Window, sequence_length: int, *, isolate_documents: bool, mask_eod: bool) -> Batch:
    """Return the row of a window of at most S + 1 tokens, of which the last is only a target.

    With isolation, a segment is a document, or the part of one that is in the row, and positions start at 0 in each;
    without, the row is one segment. Loss weight is 0 where the input ends a document (`mask_eod`), where the stream
    has no next token, and in the padding after it.
    """
    count = min(sequence_length, len(window.tokens))
    tokens_S, targets_S, segment_ids_S, positions_S = np.zeros((4, sequence_length), np.int32)
    loss_weights_S = np.zeros(sequence_length, np.float32)
    tokens_S[:count] = window.tokens[:count]
    with_target = len(window.tokens) - 1
    targets_S[:with_target] = window.tokens[1:]
    loss_weights_S[:with_target] = 1
    ends = window.ends[window.ends <= count]
    if mask_eod:
        loss_weights_S[ends - 1] = 0
    segment_ids_S[:count] = 1
    positions_S[:count] = np.arange(count)
    if isolate_documents:
        starts = np.concatenate([[0], ends[ends < count]])
        lengths = np.diff(starts, append=count)
        segment_ids_S[:count] = np.repeat(np.arange(1, len(starts) + 1), lengths)
        positions_S[:count] -= np.repeat(starts, lengths)
    return Batch(tokens_S, targets_S, loss_weights_S, segment_ids_S, positions_S)


class PackedRows:
    """The rows of a split with random access, as Grain requires. Shards are concatenated; no row spans two.

    Raises UserError if the sequence length neither divides nor multiplies the record length R.
    """

    def __init__(self, split: SplitReader, sequence_length: int, *, isolate_documents: bool, mask_eod: bool):
        record_tokens = split.record_tokens
        if sequence_length % record_tokens and record_tokens % sequence_length:
            raise UserError(f"sequence_length={sequence_length} neither divides nor multiplies record_tokens="
                            f"{record_tokens} of {split.shards[0].path.parent}: choose one that does, or prepare the "
                            f"data with record_tokens={sequence_length}")
        self._split = split
        self._sequence_length = sequence_length
        self._isolate_documents = isolate_documents
        self._mask_eod = mask_eod
        rows = [-(-reader.shard.tokens // sequence_length) for reader in split.shards]
        self._first_rows = np.cumsum([0, *rows])

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def __repr__(self) -> str:
        return f"PackedRows({self._split.shards[0].path.parent}, {len(self)} rows of {self._sequence_length})"

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        shard = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        start = int(index - self._first_rows[shard]) * self._sequence_length
        window = self._split.shards[shard].window(start, self._sequence_length + 1)
        return pack_row(window, self._sequence_length, isolate_documents=self._isolate_documents,
                        mask_eod=self._mask_eod)
