"""Rotary position embedding in Llama's layout: the two halves of a head are the two coordinates (arXiv 2104.09864).

Legend: B batch, S sequence, N heads, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope_angles(positions_BS: jax.Array, *, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of every position, each [B, S, 1, H/2], float32."""
    inverse_frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BS.astype(jnp.float32)[:, :, None, None] * inverse_frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BSNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate queries or keys [B, S, N, H]; computed in float32, returned in the input's dtype."""
    cos, sin = angles
    first, second = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BSNH.dtype)
