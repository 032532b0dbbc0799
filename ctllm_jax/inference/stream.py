"""One dialogue, token by token as it comes: a compiled prefill, then a compiled step a token.

Legend: P padded prompt, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctllm_jax.data.tokenizer import Tokenizer
from ctllm_jax.inference.generate import PROMPT_BUCKET
from ctllm_jax.inference.sampling import sample
from ctllm_jax.model.decoder import Decoder, head_weights, make_cache

_UNFINISHED = "\ufffd"
"""What a character decodes to while some of its bytes are still to come."""


def stream(decoder: Decoder, params: Any, prompt: Sequence[int], *, max_tokens: int, seed: int = 0,
           temperature: float = 0.8, top_k: int | None = None, top_p: float = 0.95,
           stop_ids: Sequence[int] = ()) -> Iterator[int]:
    """The new tokens behind a prompt, one by one, up to one of `stop_ids`, which is not given.

    The draws are those of `generate` for a single prompt with the same options. ValueError for an empty prompt.
    """
    if not len(prompt):
        raise ValueError("prompt: needs at least one token; a document starts behind the model's prefix id")
    padded = -(-len(prompt) // PROMPT_BUCKET) * PROMPT_BUCKET
    tokens_1P = np.zeros((1, padded), np.int32)
    tokens_1P[0, :len(prompt)] = prompt
    # Room in powers of two, so that a growing dialogue does not compile anew in every turn.
    room = 1 << (padded + max_tokens - 1).bit_length()
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    token, cache = _prefill(decoder, params, tokens_1P, np.int32(len(prompt)), np.uint32(seed), room=room, **options)
    for index in range(1, max_tokens + 1):
        if int(token) in stop_ids:
            return
        yield int(token)
        if index < max_tokens:
            token, cache = _next(decoder, params, token, cache, np.int32(index), np.uint32(seed), **options)


@partial(jax.jit, static_argnums=0, static_argnames=("room", "temperature", "top_k", "top_p"))
def _prefill(decoder: Decoder, params: Any, tokens_1P, length, seed, *, room: int, **options):
    cache = make_cache(decoder.config, rows=1, length=room, dtype=decoder.dtype)
    real_1P = (jnp.arange(tokens_1P.shape[1])[None] < length).astype(jnp.int32)
    hidden_1PD, cache = decoder.apply({"params": params}, tokens_1P, real_1P, cache=cache)
    return _draw(decoder, params, hidden_1PD[:, length - 1], jnp.int32(0), seed, options), cache


@partial(jax.jit, static_argnums=0, static_argnames=("temperature", "top_k", "top_p"), donate_argnames="cache")
def _next(decoder: Decoder, params: Any, token, cache, index, seed, **options):
    hidden_11D, cache = decoder.apply({"params": params}, token[None, None], cache=cache)
    return _draw(decoder, params, hidden_11D[:, 0], index, seed, options), cache


def _draw(decoder: Decoder, params: Any, hidden_1D, index, seed, options: dict[str, Any]):
    logits_1V = jnp.einsum("BD,DV->BV", hidden_1D.astype(jnp.float32), head_weights(params))
    logits_1V = jnp.where(jnp.arange(logits_1V.shape[1])[None] < decoder.config.vocab_size, logits_1V, -jnp.inf)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), index)
    return sample(logits_1V, key[None], **options)[0]


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """The text of tokens as it becomes certain: never half a character, never a character that changes later."""
    ids: list[int] = []
    given = ""
    for token in tokens:
        ids.append(token)
        certain = tokenizer.decode(ids).rstrip(_UNFINISHED)
        if certain.startswith(given) and len(certain) > len(given):
            yield certain[len(given):]
            given = certain
    whole = tokenizer.decode(ids)
    if whole.startswith(given) and len(whole) > len(given):
        yield whole[len(given):]
