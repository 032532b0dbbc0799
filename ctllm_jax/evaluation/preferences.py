"""Held-out preferences: how often a model prefers the better answer of unseen pairs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ctllm_jax.data.batch import Batch
from ctllm_jax.evaluation.bits_per_byte import sum_sources

_GROUPED = re.compile(r"(pairs|(rewards|logps)/[^/]+)/")


def evaluate_pairs(evaluation_step: Callable, params: Any, sources: Mapping[str, Iterable[Batch]], *,
                   place: Callable[[Batch], Batch],
                   describe: Callable[[dict[str, float]], dict[str, float]]) -> dict[str, Any]:
    """`loss`, `pairs`, `rewards/…` and `logps/…` of all held-out pairs, of each group (NAME/GROUP), and under
    `sources` of each source: means over pairs.

    Args:
      evaluation_step: from `make_evaluation_step`, with the loss of preferences.
      sources: name -> batches, all of one shape.
      place: puts a batch on the devices.
      describe: from the objective: sums over pairs to means.
    """
    sums = sum_sources(evaluation_step, params, sources, place=place)
    if not sums:
        return {"sources": {}}

    def figures(total: dict[str, float]) -> dict[str, float]:
        return {"loss": total["loss"] / total["weight"], **describe(total)}

    everything = {name: math.fsum(total[name] for total in sums.values()) for name in next(iter(sums.values()))}
    # A source belongs to one group, so its NAME/GROUP would only repeat NAME.
    own = {source: {name: value for name, value in total.items() if not _GROUPED.match(name)}
           for source, total in sums.items()}
    return {**figures(everything), "sources": {source: figures(total) for source, total in own.items()}}
