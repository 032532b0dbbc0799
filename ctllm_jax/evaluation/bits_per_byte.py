"""Held-out loss and bits per byte, per source.

Every held-out token counts once, including ends of documents, with the earlier tokens of its row as context; bytes are
those of the UTF-8 text. So the figure is comparable with a compressor's, for any tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from ctllm_jax.data.batch import Batch


def make_evaluation_step(loss_fn: Callable, *, out_sharding: Any) -> Callable:
    """`(params, batch) -> {loss, weight, …}`: sums, compiled. `loss_fn` as of the train step, without z-loss."""
    def evaluation_step(params: Any, batch: Batch) -> dict[str, jax.Array]:
        loss, weight, sums = loss_fn(params, None, batch)
        return {**sums, "loss": loss, "weight": weight}

    return jax.jit(evaluation_step, out_shardings=out_sharding)


def text_figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Convert sums over text to `loss` (nats per token), `tokens`, `bits_per_byte` and `bytes`; without bytes, no bits.

    Any other sum of the loss function is `loss/NAME`, a token's share, as in the records of training.
    """
    figures = {"loss": sums["loss"] / sums["weight"], "tokens": sums["weight"]}
    figures |= {f"loss/{name}": value / sums["weight"] for name, value in sums.items()
                if name not in ("loss", "weight", "bytes", "z_loss")}
    if sums.get("bytes"):
        figures |= {"bits_per_byte": sums["loss"] / math.log(2) / sums["bytes"], "bytes": sums["bytes"]}
    return figures


def evaluate_sources(evaluation_step: Callable, params: Any, sources: Mapping[str, Iterable[Batch]], *,
                     place: Callable[[Batch], Batch]) -> dict[str, dict[str, float]]:
    """`text_figures` of each source with a nonzero weight."""
    return {name: text_figures(sums)
            for name, sums in sum_sources(evaluation_step, params, sources, place=place).items()}


def sum_sources(evaluation_step: Callable, params: Any, sources: Mapping[str, Iterable[Batch]], *,
                place: Callable[[Batch], Batch]) -> dict[str, dict[str, float]]:
    """The sums of `evaluation_step` over all batches of each source; a source of weight 0 is left out.

    Args:
      evaluation_step: from `make_evaluation_step`.
      sources: name -> batches, all of one shape.
      place: puts a batch on the devices.
    """
    totals = {}
    for name, batches in sources.items():
        sums = [evaluation_step(params, place(batch)) for batch in batches]
        # Summed on the host in float64, because a million float32 additions would lose digits.
        sums = jax.device_get(sums)
        total = {key: math.fsum(float(entry[key]) for entry in sums) for key in (sums[0] if sums else ())}
        if total.get("weight"):
            totals[name] = total
    return totals
