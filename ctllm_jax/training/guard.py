"""Skipping of bad steps: the compiled step skips an update that is not finite or is a spike.

Everything here is arithmetic on scalars that every device has, so all devices take the same decision without the host.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ctllm_jax.config.reliability import SpikesConfig
from ctllm_jax.training.state import Spikes, State

LEAST_DEVIATION = 1e-3
"""Lower bound of the standard deviation as a share of the mean; without it, rounding on a plateau would count as
spikes."""


def judge_step(bad_steps: Any, loss: jax.Array, grad_norm: jax.Array, *,
               spikes: SpikesConfig | None) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    """Decide whether a step's update is applied; return the new statistics and the metrics.

    Args:
      bad_steps: the state's counter: int32, or `Spikes` if and only if `spikes` is given.
      loss, grad_norm: float32 scalars of the whole batch, the norm before clipping.
      spikes: None: only non-finite steps are skipped.

    Returns:
      `good`, bool; the new `bad_steps`; `skipped` (1 for this step or 0), `bad_steps` and `spikes`: counts so far.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if spikes is None:
        bad_steps = bad_steps + jnp.where(finite, 0, 1)
        return finite, bad_steps, {"skipped": jnp.where(finite, 0, 1), "bad_steps": bad_steps}
    kept: Spikes = bad_steps
    far_loss, *loss_figures = _compare(loss, kept.loss_mean, kept.loss_variance, seen=kept.seen, config=spikes)
    far_norm, *norm_figures = _compare(grad_norm, kept.norm_mean, kept.norm_variance, seen=kept.seen, config=spikes)
    spike = finite & (kept.seen >= spikes.warmup) & (far_loss | far_norm)
    good = finite & ~spike
    figures = [jnp.where(finite, new, old) for new, old in zip(
        (kept.seen + 1, *loss_figures, *norm_figures),
        (kept.seen, kept.loss_mean, kept.loss_variance, kept.norm_mean, kept.norm_variance), strict=True)]
    after = Spikes(kept.bad_steps + jnp.where(finite, 0, 1), kept.spikes + jnp.where(spike, 1, 0), *figures)
    return good, after, {"skipped": jnp.where(good, 0, 1), "bad_steps": after.bad_steps, "spikes": after.spikes}


def count_skipped(state: State) -> dict[str, int]:
    """The counts so far: `bad_steps` and, with the spike guard, `spikes`."""
    counts = state.bad_steps
    if isinstance(counts, Spikes):
        return {"bad_steps": int(counts.bad_steps), "spikes": int(counts.spikes)}
    return {"bad_steps": int(counts)}


def _compare(value: jax.Array, mean: jax.Array, variance: jax.Array, *, seen: jax.Array,
             config: SpikesConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return whether a value is far above the mean, and the updated mean and variance.

    A value above the bound enters as the bound. So a single spike does not widen it for the next one; but if the level
    stays higher, the bound grows by a constant factor per step, and the run continues.
    """
    deviation = jnp.maximum(jnp.sqrt(variance), LEAST_DEVIATION * jnp.abs(mean))
    bound = mean + config.deviations * deviation
    acting = seen >= config.warmup
    far = value > bound
    taken = jnp.where(acting & far, bound, value)
    # The plain mean for the first `window` values, the weighted mean afterwards.
    share = jnp.maximum(1.0 / (seen.astype(jnp.float32) + 1.0), 1.0 / config.window)
    difference = taken - mean
    return far, mean + share * difference, (1.0 - share) * (variance + share * difference * difference)
