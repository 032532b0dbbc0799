"""SwiGLU's gate, up and activation (arXiv 2002.05202)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ctllm_jax.kernels.dispatch import choose

__all__ = ["chosen", "swiglu"]


def chosen(implementation: str = "auto") -> str:
    """The implementation that `swiglu` takes on this backend.

    Raises:
      ValueError: the named one cannot run here.
    """
    return choose("swiglu", implementation, reasons={"pallas": "no Pallas kernel of this op is in this version", "xla": None})


def swiglu(x: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """silu(x · gate) ⊙ (x · up), the activation in float32.

    Args:
      x: [..., D].
      gate_DF, up_DF: [D, F], x's dtype.
      implementation: "auto", or one that must run.

    Returns:
      [..., F] in x's dtype.

    Raises:
      ValueError: an implementation that cannot run here.
    """
    chosen(implementation)
    gate, up = jnp.dot(x, gate_DF), jnp.dot(x, up_DF)
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(x.dtype)
