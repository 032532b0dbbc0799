"""Several processes as one program."""

from __future__ import annotations

import os

from ctllm_jax.config.errors import UserError

_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> int:
    """Join the other processes if the environment names them; returns how many there are.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID are set together or not at all. Must be
    called before any device is touched.

    Raises:
      UserError: only some of the three are set, or the numbers make no sense.
    """
    given = {name: os.environ[name] for name in _NAMES if os.environ.get(name)}
    if not given:
        return 1
    missing = [name for name in _NAMES if name not in given]
    if missing:
        raise UserError(f"{', '.join(given)} set, but not {', '.join(missing)}: the three go together")
    count, index = given["JAX_NUM_PROCESSES"], given["JAX_PROCESS_ID"]
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise UserError(f"JAX_PROCESS_ID={index} of JAX_NUM_PROCESSES={count}: needs 0 <= id < number")
    if int(count) > 1:
        import jax

        jax.distributed.initialize(given["JAX_COORDINATOR_ADDRESS"], int(count), int(index))
    return int(count)
