"""`launch.py prepare`: text to a dataset directory."""

from __future__ import annotations

from ctllm_jax.config.data import PrepareConfig
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.dataset.build import Progress, Summary, build_from_files


def prepare(config: PrepareConfig, *, progress: Progress = lambda stage, done, total: None) -> Summary:
    """Read, deduplicate, split, tokenize, shuffle and pack `config.input` into the dataset directory `config.output`.

    UserError where an input cannot be read, more than `max_bad` records are bad, or nothing is left.
    """
    return build_from_files(config, load_tokenizer(config.tokenizer), progress=progress)
