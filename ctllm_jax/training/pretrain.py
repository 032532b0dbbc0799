"""Pretraining as a stage: its data is that of the config, and its objective is the next token."""

from __future__ import annotations

from pathlib import Path

from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.data.pretrain import open_training_data
from ctllm_jax.dataset.damage import DamageLog
from ctllm_jax.training.joins import checked_start
from ctllm_jax.training.objective import Opened, next_tokens

DAMAGED = "damaged"
"""Folder of a run directory for the records of the data that could not be read."""


def open_stage(config: PretrainConfig, *, directory: Path | None = None, keep_texts: bool = False) -> Opened:
    """Open the datasets of a run.

    Args:
      directory: the run directory, which lists records that cannot be read; None: such a record is an error.
      keep_texts: also keep the texts of the rows, which datasets always have.

    Raises:
      UserError: data that does not fit the config, or weights in `config.init` that were trained differently.
    """
    damage = None if directory is None else DamageLog(directory / DAMAGED, budget=config.data.damaged_budget)
    data = open_training_data(config.data, sequence_length=config.batch.sequence_length, rows=config.batch.rows,
                              seed=config.seed, vocab_size=config.model.vocab_size, damage=damage)
    return Opened(config, checked_start(config, data), next_tokens(data.token_bytes), {})
