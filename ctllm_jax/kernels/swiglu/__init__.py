"""SwiGLU's gate, up and activation (arXiv 2002.05202)."""

from __future__ import annotations

import jax

from ctllm_jax.kernels.dispatch import choose
from ctllm_jax.kernels.swiglu.xla import activate, swiglu_xla

__all__ = ["activate", "chosen", "swiglu"]


def chosen(implementation: str = "auto") -> str:
    """The implementation that `swiglu` takes on this backend.

    Raises:
      ValueError: the named one cannot run here.
    """
    return choose("swiglu", implementation, reasons={
        "pallas": "no Pallas kernel of this op is in this version", "xla": None})


def swiglu(x: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """silu(x · gate) ⊙ (x · up), the activation in float32.

    Args:
      x: [..., D].
      gate_DF, up_DF: [D, F], x's dtype.
      implementation: "auto", or one that must run.

    Returns:
      [..., F] in x's dtype.

    Raises:
      ValueError: shapes that do not fit, or an implementation that cannot run here.
    """
    hidden = x.shape[-1]
    if gate_DF.ndim != 2 or gate_DF.shape != up_DF.shape or gate_DF.shape[0] != hidden:
        raise ValueError(f"swiglu: gate {gate_DF.shape} and up {up_DF.shape} must both be [{hidden}, F],"
                         f" as x is {x.shape}")
    chosen(implementation)
    return swiglu_xla(x, gate_DF, up_DF)
