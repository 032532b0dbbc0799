"""Batches of pretraining: a config in, a `BatchSource` out."""

from __future__ import annotations

from collections.abc import Iterable

from ctllm_jax.config.data import DataConfig
from ctllm_jax.data.batch import Batch, BatchSource
from ctllm_jax.data.synthetic import SyntheticData


def open_training_data(config: DataConfig, *, sequence_length: int, rows: int, seed: int,
                       vocab_size: int) -> BatchSource:
    """The training data of a config.

    `rows` is the global batch (B), `sequence_length` is S, `vocab_size` the model's. UserError where a source cannot
    be read, or does not fit the model or the other sources.
    """
    if config.kind == "synthetic":
        return SyntheticData(sequence_length=sequence_length, rows=rows, seed=seed, vocab_size=vocab_size,
                             isolate_documents=config.isolate_documents, mask_eod=config.mask_eod)
    raise NotImplementedError("data from files is not there yet")


def open_held_out_data(config: DataConfig, *, split: str, sequence_length: int, rows: int, max_tokens: int,
                       vocab_size: int) -> dict[str, Iterable[Batch]]:
    """For each source, batches [rows, S] of its held-out split, in order, from its first token.

    Each can be iterated again and again. The last batch is filled up with rows of segment 0. Synthetic data has none.
    """
    if config.kind == "synthetic":
        return {}
    raise NotImplementedError("data from files is not there yet")
