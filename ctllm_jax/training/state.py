"""The training state: one pytree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding

from ctllm_jax.config.errors import UserError
from ctllm_jax.training.optimizer import path_name

MOST_REPLICATED = 2**20
"""Largest size in bytes of an optimizer leaf that may be replicated: enough for counters and statistics."""


@struct.dataclass
class State:
    """The complete state of a run.

    Attributes:
      params: the trained parameters, float32.
      opt_state: the optimizer's state, only for `params`.
      step: int32, optimizer steps done, including skipped updates.
      data_step: int32, batches consumed: equal to `step` until a window of data is skipped.
      bad_steps: int32, steps whose update was skipped because it was not finite; with `bad_steps.spikes`, a `Spikes`,
        which contains this count (`training.guard`).
    """

    params: Any
    opt_state: Any
    step: jax.Array
    data_step: jax.Array
    bad_steps: Any


@struct.dataclass
class Spikes:
    """Statistics of the spike guard: scalars, equal on every device.

    Attributes:
      bad_steps, spikes: int32, steps skipped because they were not finite, and because they were spikes.
      seen: int32, number of steps in the statistics below.
      loss_mean, loss_variance, norm_mean, norm_variance: float32, exponentially weighted.
    """

    bad_steps: jax.Array
    spikes: jax.Array
    seen: jax.Array
    loss_mean: jax.Array
    loss_variance: jax.Array
    norm_mean: jax.Array
    norm_variance: jax.Array


def init_state(params: Any, optimizer: optax.GradientTransformation, *, spikes: bool = False) -> State:
    """The state at step 0; each counter is a separate array, so that the whole state can be donated.

    `spikes`: include the statistics of the spike guard.
    """
    step, data_step, bad_steps = (jnp.zeros((), jnp.int32) for _ in range(3))
    return State(params, optimizer.init(params), step, data_step, init_spikes(bad_steps) if spikes else bad_steps)


def init_spikes(bad_steps: jax.Array) -> Spikes:
    """Empty statistics of the spike guard, for a run with this many bad steps."""
    return Spikes(bad_steps, *(jnp.zeros((), jnp.int32) for _ in range(2)),
                  *(jnp.zeros((), jnp.float32) for _ in range(4)))


def like_params(state: Any, params: Any, shardings: Any, otherwise: NamedSharding) -> Any:
    """Shardings of a state: a leaf whose path ends in a parameter's path is sharded like that parameter.

    Optax nests trees like that of the parameters in its own containers; `optax.partition` and `optax.masked` keep only
    some of their leaves. A leaf with another shape than its parameter, or without one, is replicated.

    Args:
      state: a tree of shapes and dtypes.
      params, shardings: the parameters' shapes and shardings.
      otherwise: the replicated sharding.

    Raises:
      UserError: a leaf of more than `MOST_REPLICATED` bytes would be replicated.
    """
    known = {tuple(path_name(path).split("/")): (leaf.shape, layout) for (path, leaf), layout in
             zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True)}
    split = any(not layout.is_fully_replicated for _, layout in known.values())

    def lay_out(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        parts = tuple(name.split("/"))
        for start in range(len(parts)):  # the longest suffix of the path that is a parameter's path
            shape, layout = known.get(parts[start:], (None, None))
            if shape == leaf.shape:
                return layout
        size = leaf.size * leaf.dtype.itemsize
        if split and size > MOST_REPLICATED:
            raise UserError(f"the optimizer's state {name} {list(leaf.shape)} belongs to no parameter of that shape, so"
                            f" each device would hold all of its {size / 2**20:.0f} MiB; give the state the paths and"
                            " shapes of the parameters")
        return otherwise

    return jax.tree_util.tree_map_with_path(lay_out, state)
