"""Attention on packed batches: causal, grouped heads, segment ids, sliding window."""

from __future__ import annotations

import jax

from ctllm_jax.kernels.attention.cached import cached_attention
from ctllm_jax.kernels.attention.xla import attention_xla
from ctllm_jax.kernels.dispatch import choose

__all__ = ["attention", "cached_attention", "chosen"]


def chosen(implementation: str = "auto") -> str:
    """The implementation that `attention` takes on this backend.

    Raises:
      ValueError: the named one cannot run here.
    """
    return choose("attention", implementation, reasons={
        "pallas": "no Pallas kernel of this op is in this version",
        "cudnn": "packed batches are not bound to it in this version",
        "xla": None})


def attention(query_BSNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array, *,
              segment_ids: jax.Array | None = None, causal: bool = True, sliding_window: int | None = None,
              scale: float | None = None, implementation: str = "auto") -> jax.Array:
    """Scaled dot-product attention (arXiv 1706.03762), softmax in float32.

    Args:
      query_BSNH: [B, S, N, H], float32 or bfloat16.
      key_BSKH, value_BSKH: [B, S, K, H]; K divides N, and each serves N / K query heads.
      segment_ids: int [B, S]; a token sees its own segment only, and padding (segment 0) gives zeros. None: one
        segment, no padding, nothing compared.
      causal: a token sees none behind it.
      sliding_window: tokens that a token sees, itself included; needs `causal`.
      scale: of the scores; None: H ** -0.5.
      implementation: "auto", or one that must run.

    Returns:
      [B, S, N, H] in the query's dtype.

    Raises:
      ValueError: shapes that do not fit, or an implementation that cannot run here.
    """
    batch, length, heads, head_dim = query_BSNH.shape
    if key_BSKH.shape != value_BSKH.shape or (*key_BSKH.shape[:2], key_BSKH.shape[3]) != (batch, length, head_dim):
        raise ValueError(f"attention: key {key_BSKH.shape} and value {value_BSKH.shape} must both be"
                         f" [{batch}, {length}, K, {head_dim}], as query is {query_BSNH.shape}")
    if heads % key_BSKH.shape[2]:
        raise ValueError(f"attention: {key_BSKH.shape[2]} key and value heads must divide {heads} query heads")
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"attention: segment_ids {segment_ids.shape} must be {(batch, length)}")
    if sliding_window is not None and not causal:
        raise ValueError(f"attention: sliding_window={sliding_window} needs causal=True")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"attention: sliding_window={sliding_window} must be at least 1: a token sees itself")
    chosen(implementation)
    return attention_xla(query_BSNH, key_BSKH, value_BSKH, segment_ids=segment_ids, causal=causal,
                         sliding_window=sliding_window, scale=head_dim**-0.5 if scale is None else scale)
