"""Drawing the next token.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sample(logits_BV: jax.Array, key: jax.Array, *, temperature: float, top_k: int | None = None,
           top_p: float = 1.0) -> jax.Array:
    """One token a row, int32.

    Args:
      logits_BV: float32.
      key: one for all rows, or one a row [B]; a row's draw depends on its own key alone then.
      temperature: 0 takes the likeliest token.
      top_k: draw from this many likeliest; None: from all.
      top_p: draw from the smallest set of likeliest tokens that together have this probability (arXiv 1904.09751).
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = truncate(logits_BV / temperature, top_k=top_k, top_p=top_p)
    draw = jax.random.categorical if key.ndim == 0 else jax.vmap(jax.random.categorical)
    return draw(key, logits_BV).astype(jnp.int32)


def truncate(logits_BV: jax.Array, *, top_k: int | None, top_p: float) -> jax.Array:
    """The logits with -inf where top-k and top-p (of what top-k left) forbid a token; ties with the last one stay."""
    vocab = logits_BV.shape[-1]
    if top_k is not None and top_k < vocab:
        lowest_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)
    if top_p < 1:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token is in the set while those before it have less than top_p; so the likeliest always is.
        inside_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV < top_p
        lowest_B1 = jnp.min(jnp.where(inside_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)
    return logits_BV
