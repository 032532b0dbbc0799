"""What a stage of training minimizes, and what it hands to a run.

The objective of pretraining and SFT, next-token cross-entropy, is here; `training.dpo` has that of preferences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.data.batch import Batch, BatchSource
from ctllm_jax.losses.cross_entropy import chunked_cross_entropy
from ctllm_jax.model.decoder import Decoder, head_weights
from ctllm_jax.training.step import STEP_METRICS


class Objective(NamedTuple):
    """What a stage minimizes.

    Attributes:
      make_loss_fn: `(config, decoder, mesh) -> LossFn` (`training.step`), for training.
      describe: metrics of a step, as floats -> values of its record. A `loss` among them replaces the step's.
      make_evaluation_fn: the same as `make_loss_fn` without regularizers; None: `make_loss_fn`.
      num_segments: M of the batch's `preference` part, for a loss over pairs of answers; 0 where it has none.
    """

    make_loss_fn: Callable
    describe: Callable[[dict[str, float]], dict[str, float]]
    make_evaluation_fn: Callable | None = None
    num_segments: int = 0


class Opened(NamedTuple):
    """A stage whose data is open, ready for a run.

    Attributes:
      config: the stage's config, with what the data and `init` decide filled in.
      data: its batches.
      objective: what it minimizes.
      meta: what its checkpoints state about themselves, as JSON.
      prepare: `(run directory, progress, beat) -> a line about the result`, called before the run's step is compiled.
        It calls `progress` with a line for each part of its work, and `beat` as a sign of life. None: there is nothing
        to prepare.
    """

    config: PretrainConfig
    data: BatchSource
    objective: Objective
    meta: dict[str, Any]
    prepare: Callable | None = None


def next_tokens(token_bytes: np.ndarray | None = None) -> Objective:
    """Next-token cross-entropy with the z-loss of the config.

    Args:
      token_bytes: UTF-8 bytes of each id, for bits per byte; None where there is no text.
    """
    def make(config: PretrainConfig, decoder: Decoder, mesh: jax.sharding.Mesh | None) -> Callable:
        return make_loss_fn(config, decoder, mesh=mesh, token_bytes=token_bytes, z_loss=config.loss.z_loss,
                            padded=config.isolated)

    def make_evaluation(config: PretrainConfig, decoder: Decoder, mesh: jax.sharding.Mesh | None) -> Callable:
        return make_loss_fn(config, decoder, mesh=mesh, token_bytes=token_bytes, z_loss=0.0, padded=config.isolated)

    return Objective(make, describe, make_evaluation)


def make_loss_fn(config: PretrainConfig, decoder: Decoder, *, mesh: jax.sharding.Mesh | None,
                 token_bytes: np.ndarray | None, z_loss: float, padded: bool) -> Callable:
    """`(params, frozen, batch) -> (nats, weight, {z_loss, bytes})`: next-token cross-entropy, summed.

    Args:
      token_bytes: UTF-8 bytes of each id, which turn a loss into bits per byte; None where there is no text.
      padded: whether segment ids carry information; False lets attention skip the comparison.
    """
    table = None
    if token_bytes is not None:
        table = np.zeros(config.model.padded_vocab_size, np.float32)
        table[:len(token_bytes)] = token_bytes

    def loss_fn(params: Any, frozen: Any, batch: Batch):
        segment_ids = batch.segment_ids if padded else None
        hidden_BSD, _ = decoder.apply({"params": params}, batch.tokens, segment_ids, batch.positions)
        loss, weight, sums = chunked_cross_entropy(
            hidden_BSD, head_weights(params), batch.targets, batch.loss_weights, z_loss=z_loss,
            chunk_size=config.compute.loss_chunk, vocab_size=config.model.vocab_size, mesh=mesh,
            rings=config.compute.gradient_rings)
        if table is not None:
            sums = {**sums, "bytes": jnp.sum(jnp.asarray(table)[batch.targets] * batch.loss_weights)}
        return loss, weight, sums

    return loss_fn


def describe(metrics: dict[str, float]) -> dict[str, float]:
    """The cross-entropy without the z-loss that is trained with it, its bits per byte, and every other sum a token."""
    weight = max(metrics["weight"], 1.0)
    z_loss = metrics.get("z_loss", 0.0) / weight
    values = {"loss": metrics["loss"] - z_loss}
    if metrics.get("bytes"):
        values["bits_per_byte"] = values["loss"] * metrics["weight"] / np.log(2) / metrics["bytes"]
    values |= {"z_loss": z_loss} if z_loss else {}
    return values | {f"loss/{name}": value / weight for name, value in metrics.items()
                     if name not in STEP_METRICS | {"z_loss", "bytes"}}
