"""What a run carries from step to step: one pytree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class State:
    """The whole of a run's state.

    Attributes:
      params: what is trained, float32.
      opt_state: of the optimizer, for `params` alone.
      step: int32, optimizer steps done.
      data_step: int32, batches consumed: equal to `step` until a window of data is skipped.
      bad_steps: int32, steps whose update was not finite.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    data_step: jax.Array
    bad_steps: jax.Array


def init_state(params: Any, optimizer: optax.GradientTransformation) -> State:
    """The state at step 0; each counter its own array, so that the whole state can be donated."""
    return State(params, optimizer.init(params), *(jnp.zeros((), jnp.int32) for _ in range(3)))
