"""Held-out loss and bits per byte, per source: what a model pays for text that it has not seen.

Every held-out token is paid for once, ends of documents included, with what stands before it in its row as context; the
bytes are those of the UTF-8 text. So the figure can stand beside a compressor's, whatever the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from ctllm_jax.data.batch import Batch


def make_evaluation_step(loss_fn: Callable, *, out_sharding: Any) -> Callable:
    """`(params, batch) -> {nats, tokens, bytes}`: sums, compiled. `loss_fn` as of the train step, without z-loss."""
    def evaluation_step(params: Any, batch: Batch) -> dict[str, jax.Array]:
        loss, weight, sums = loss_fn(params, None, batch)
        return {"nats": loss, "tokens": weight, **({"bytes": sums["bytes"]} if "bytes" in sums else {})}

    return jax.jit(evaluation_step, out_shardings=out_sharding)


def evaluate_sources(evaluation_step: Callable, params: Any, sources: Mapping[str, Iterable[Batch]], *,
                     place: Callable[[Batch], Batch]) -> dict[str, dict[str, float]]:
    """Per source: `loss` (nats a token), `bits_per_byte`, `tokens`, `bytes`. A source without text has no bits.

    Args:
      evaluation_step: from `make_evaluation_step`.
      sources: name -> batches, all of one shape.
      place: puts a batch on the devices.
    """
    results = {}
    for name, batches in sources.items():
        sums = [evaluation_step(params, place(batch)) for batch in batches]
        # Summed on the host in float64: a million float32 additions would lose digits.
        sums = jax.device_get(sums)
        total = {key: math.fsum(float(entry[key]) for entry in sums) for key in (sums[0] if sums else ())}
        if not total.get("tokens"):
            continue
        results[name] = {"loss": total["nats"] / total["tokens"], "tokens": total["tokens"]}
        if total.get("bytes"):
            results[name] |= {"bits_per_byte": total["nats"] / math.log(2) / total["bytes"], "bytes": total["bytes"]}
    return results
