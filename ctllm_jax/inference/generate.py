"""Continue a list of prompts with a model, through a separate engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from ctllm_jax.inference.engine import Engine
from ctllm_jax.inference.request import Request
from ctllm_jax.inference.schedule import rounded
from ctllm_jax.model.decoder import Decoder


def generate(decoder: Decoder, params: Any, prompts: Sequence[Sequence[int]], *, max_tokens: int, seed: int = 0,
             temperature: float = 0.8, top_k: int | None = None, top_p: float = 0.95, stop_ids: Sequence[int] = (),
             row_ids: Sequence[int] | None = None, mesh: Mesh | None = None, split: bool = True) -> list[list[int]]:
    """The new tokens of each prompt, without the one that ends it.

    Args:
      decoder, mesh, split: as of `Engine`.
      prompts: token ids, at least one each.
      max_tokens: largest number of new tokens per row.
      seed: a row's random draws depend on the seed and its row id, not on other rows.
      stop_ids: any of them ends a row.
      row_ids: a 32-bit number for each row; None: its index in the list.

    Raises:
      ValueError: an empty prompt.
    """
    row_ids = range(len(prompts)) if row_ids is None else row_ids
    requests = [Request(prompt=tuple(map(int, prompt)), max_tokens=max_tokens, temperature=temperature, top_k=top_k,
                        top_p=top_p, stop_ids=tuple(dict.fromkeys(stop_ids)), seed=seed, row=int(row))
                for prompt, row in zip(prompts, row_ids, strict=True)]
    if not requests:
        return []
    longest = max(len(request.prompt) for request in requests) + max_tokens
    engine = Engine(decoder, params, mesh=mesh, split=split, **rounded(len(requests), longest))
    return [[token.id for token in tokens] for tokens, _, _ in engine.run(requests)]
