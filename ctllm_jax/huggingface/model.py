"""A Hugging Face folder as a MODEL: its architecture, and the meta that our checkpoint would have."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from ctllm_jax.config.model import ModelConfig
from ctllm_jax.huggingface.architecture import CONFIG, embedding_rows, read_model_config
from ctllm_jax.huggingface.shards import ShardReader
from ctllm_jax.huggingface.tokenizer import read_tokenizer
from ctllm_jax.huggingface.weights import Weights

logger = logging.getLogger(__name__)


def is_huggingface(directory: Path) -> bool:
    """Whether a folder is a model in Hugging Face's layout, and no run directory."""
    return (directory / CONFIG).is_file() and not (directory / "config.yaml").is_file()


def read_config(directory: Path) -> ModelConfig:
    """The architecture. UserError as `architecture.read_model_config` and `tokenizer.read_tokenizer`."""
    read_model_config(directory, vocab_size=embedding_rows(directory))  # unsupported keys, before a tokenizer
    return read_model_config(directory, vocab_size=read_tokenizer(directory, rows=embedding_rows(directory)).size)


def open_weights(directory: Path) -> Weights:
    """The weights, checked by name and shape. UserError as `weights.Weights`."""
    return Weights(directory, read_config(directory))


def read_meta(directory: Path) -> dict[str, Any]:
    """`meta` of the checkpoint that the folder is: its ids and its template; the fingerprint is of its weights.

    Raises:
      UserError: an architecture, weights or a tokenizer that cannot be read.
    """
    read_model_config(directory, vocab_size=embedding_rows(directory))
    reader = ShardReader(directory)
    origin = read_tokenizer(directory, rows=embedding_rows(directory))
    if origin.problem:
        logger.warning("the chat template of %s is not used: %s", directory, origin.problem)
    config = hashlib.sha256((directory / CONFIG).read_bytes()).hexdigest()
    return {"step": 0, "tokens": 0, "steps": 0, "init": None, "eod_id": origin.eod_id,
            "prefix_id": origin.prefix_id, "stop_ids": origin.stop_ids, "generation": origin.generation,
            "template": origin.template, "template_problem": origin.problem,
            "fingerprint": {"huggingface": {"config_sha256": config, "weights_sha256": reader.identity()}}}


def weight_bytes(directory: Path) -> int:
    """Size of the weights on the disk."""
    return sum(path.stat().st_size for path in ShardReader(directory).files)
