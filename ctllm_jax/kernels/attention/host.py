"""Attention and its gradients in float64 on the host, in numpy, as the reference of all checks.

Legend: B batch, S queries, T keys, N query heads, K kv heads, G query heads of one kv head, H head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Exact(NamedTuple):
    """The results of attention, float64: y [B, S, N, H], lse [B, S, N], and the gradients of Σ y · cotangent."""

    y: np.ndarray
    lse: np.ndarray
    query_grad: np.ndarray
    key_grad: np.ndarray
    value_grad: np.ndarray


def attention_float64(query, key, value, cotangent, *, segment_ids=None, positions=None, causal: bool = True,
                      sliding_window: int | None = None, scale: float | None = None, lse_cotangent=None) -> Exact:
    """Compute `kernels.attention` row by row and head by head, and its gradients by explicit formulas.

    Args:
      query, cotangent: [B, S, N, H], any float dtype.
      key, value: [B, S, K, H].
      lse_cotangent: [B, S, N], if given, the gradients include those of Σ lse · lse_cotangent.
    """
    query, key, value, cotangent = (np.asarray(x, np.float64) for x in (query, key, value, cotangent))
    rows, length, heads, head_dim = query.shape
    group = heads // key.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    y, lse = np.zeros(query.shape), np.full((rows, length, heads), -1e30)
    grads = np.zeros(query.shape), np.zeros(key.shape), np.zeros(value.shape)
    for b in range(rows):
        mask_ST = _mask(length, None if segment_ids is None else np.asarray(segment_ids[b]),
                        None if positions is None else np.asarray(positions[b]), causal, sliding_window)
        seen_S = mask_ST.any(axis=1)
        for n in range(heads):
            k = n // group
            scores_ST = np.where(mask_ST, scale * query[b, :, n] @ key[b, :, k].T, -np.inf)
            highest_S1 = np.where(seen_S, scores_ST.max(axis=1), 0)[:, None]
            exps_ST = np.exp(scores_ST - highest_S1)
            sums_S1 = np.where(seen_S, exps_ST.sum(axis=1), 1)[:, None]
            probs_ST = exps_ST / sums_S1
            y[b, :, n] = probs_ST @ value[b, :, k]
            lse[b, seen_S, n] = (np.log(sums_S1) + highest_S1)[seen_S, 0]
            slopes_ST = cotangent[b, :, n] @ value[b, :, k].T - np.sum(y[b, :, n] * cotangent[b, :, n], axis=1)[:, None]
            if lse_cotangent is not None:
                slopes_ST = slopes_ST + np.asarray(lse_cotangent, np.float64)[b, :, n, None]
            slopes_ST = probs_ST * slopes_ST * scale
            grads[0][b, :, n] = slopes_ST @ key[b, :, k]
            grads[1][b, :, k] += slopes_ST.T @ query[b, :, n]
            grads[2][b, :, k] += probs_ST.T @ cotangent[b, :, n]
    return Exact(y, lse, *grads)


def _mask(length: int, segments, positions, causal: bool, sliding_window: int | None):
    places = np.arange(length) if positions is None else positions
    behind_ST = places[:, None] - places[None]
    mask_ST = np.ones((length, length), bool)
    if causal:
        mask_ST &= behind_ST >= 0
    if sliding_window is not None:
        mask_ST &= behind_ST < sliding_window
    if segments is not None:
        mask_ST &= (segments[:, None] == segments[None]) & (segments[:, None] > 0)
    return mask_ST
