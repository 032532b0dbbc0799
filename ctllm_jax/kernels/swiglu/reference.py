"""SwiGLU as in the paper (arXiv 2002.05202), in float32. For tests, and for reading."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def swiglu_reference(x: jax.Array, gate_DF: jax.Array, up_DF: jax.Array) -> jax.Array:
    """silu(x · gate) ⊙ (x · up), in x's dtype."""
    gate, up = (jnp.dot(x.astype(jnp.float32), weight.astype(jnp.float32)) for weight in (gate_DF, up_DF))
    return (gate * jax.nn.sigmoid(gate) * up).astype(x.dtype)
