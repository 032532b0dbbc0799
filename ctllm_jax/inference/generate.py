"""Text from a model: one prefill of the prompts, then a token a row at a time through the cache, in one compiled loop.

Legend: B rows, P padded prompt, T prompt and new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctllm_jax.inference.sampling import sample
from ctllm_jax.model.decoder import Decoder, head_weights, make_cache

PROMPT_BUCKET = 32
"""Prompts are padded to a multiple of this many tokens, so that a few compiled lengths serve all."""


def generate(decoder: Decoder, params: Any, prompts: Sequence[Sequence[int]], *, max_tokens: int, seed: int = 0,
             temperature: float = 0.8, top_k: int | None = None, top_p: float = 0.95, stop_ids: Sequence[int] = (),
             row_ids: Sequence[int] | None = None, pad_to: int = 0) -> list[list[int]]:
    """The new tokens of each prompt, without the one that ends it.

    Args:
      decoder: its `remat` and `constrain` do not matter here.
      prompts: token ids, at least one each.
      max_tokens: most new tokens a row.
      seed: a row's draws depend on the seed and its row id, not on its neighbours.
      stop_ids: any of them ends a row.
      row_ids: a number of 32 bits for each row; None: its place in the list.
      pad_to: prompts are padded to at least so many tokens, so that lists of other lengths need no other program.

    Raises:
      ValueError: an empty prompt.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts: each needs at least one token; a document starts behind the model's prefix id")
    longest = max([pad_to, *map(len, prompts)])
    padded = -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET
    tokens_BP = np.zeros((len(prompts), padded), np.int32)
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, :len(prompt)] = prompt
    ids_B = np.asarray(range(len(prompts)) if row_ids is None else list(row_ids), np.uint32)
    new_BM, counts_B = jax.device_get(_generate(
        decoder, params, tokens_BP, lengths_B, np.uint32(seed), ids_B, np.asarray(list(stop_ids), np.int32),
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p))
    return [row[:count].tolist() for row, count in zip(new_BM, counts_B, strict=True)]


@partial(jax.jit, static_argnums=0, static_argnames=("max_tokens", "temperature", "top_k", "top_p"))
def _generate(decoder: Decoder, params: Any, tokens_BP, lengths_B, seed, ids_B, stop_ids, *, max_tokens: int,
              temperature: float, top_k: int | None, top_p: float):
    """Returns (new tokens [B, max_tokens], how many of them count [B])."""
    rows, padded = tokens_BP.shape
    config = decoder.config
    head_DV = head_weights(params)
    keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(ids_B)

    def draw(hidden_BD, index):
        logits_BV = jnp.einsum("BD,DV->BV", hidden_BD.astype(jnp.float32), head_DV)
        logits_BV = jnp.where(jnp.arange(logits_BV.shape[1])[None] < config.vocab_size, logits_BV, -jnp.inf)
        return sample(logits_BV, jax.vmap(jax.random.fold_in, (0, None))(keys_B, index), temperature=temperature,
                      top_k=top_k, top_p=top_p)

    cache = make_cache(config, rows=rows, length=padded + max_tokens, dtype=decoder.dtype)
    real_BP = (jnp.arange(padded)[None] < lengths_B[:, None]).astype(jnp.int32)
    hidden_BPD, cache = decoder.apply({"params": params}, tokens_BP, real_BP, cache=cache)
    last_BD = jnp.take_along_axis(hidden_BPD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    first_B = draw(last_BD, 0)

    def unfinished(carry):
        index, _, _, _, done_B, _ = carry
        return (index < max_tokens) & ~jnp.all(done_B)

    def step(carry):
        index, token_B, cache, new_BM, done_B, counts_B = carry
        done_B = done_B | jnp.isin(token_B, stop_ids)
        new_BM = new_BM.at[:, index].set(token_B)
        counts_B = counts_B + ~done_B
        hidden_B1D, cache = decoder.apply({"params": params}, token_B[:, None], cache=cache)
        return index + 1, draw(hidden_B1D[:, 0], index + 1), cache, new_BM, done_B, counts_B

    start = (jnp.int32(0), first_B, cache, jnp.zeros((rows, max_tokens), jnp.int32), jnp.zeros(rows, bool),
             jnp.zeros(rows, jnp.int32))
    _, _, _, new_BM, _, counts_B = jax.lax.while_loop(unfinished, step, start)
    return new_BM, counts_B
