"""One step around a ring of TPUs in both directions at once, by remote copies that overlap with other work.

XLA's collective-permute does the same. But for slices of more than 16 v5e chips, TPU's compiler makes it synchronous
(libtpu 0.0.42), so nothing is computed meanwhile; a copy that a kernel starts continues after the kernel ends. Based on
JAX's guide to distributed computing in Pallas. Call these functions inside a `shard_map` over all mesh axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SEND, RECEIVE = "ring_send", "ring_receive"
_HBM = pl.BlockSpec(memory_space=pltpu.HBM)
_SEMAPHORE = pl.BlockSpec(memory_space=pltpu.SEMAPHORE)
_SCALARS = pl.BlockSpec(memory_space=pltpu.SMEM)


class Moving(NamedTuple):
    """Two transfers in progress: this device's arrays, which are still read, and the buffers that the neighbors
    fill."""

    sent: Sequence[jax.Array]
    arriving: Sequence[jax.Array]
    semaphores: Sequence[jax.Array]


def send(arrays: Sequence[jax.Array], neighbors: Sequence[jax.Array], *, axis: str, barrier: int) -> Moving:
    """Start to send the first of two arrays to the next device of a ring, and the second to the previous one.

    `receive` must be called before the next `send` with the same barrier; otherwise a device two steps ahead would
    write into one that is not ready. A loop whose body contains both satisfies this; `tests/training/test_aot.py`
    checks it.

    Args:
      arrays: two, each of one shape and dtype on all devices.
      neighbors: int32 indices along the mesh axis: of the next and of the previous device.
      barrier: a number that no ring with other neighbors, and no other kernel with a barrier, may share.
    """
    targets = jnp.stack([_number(axis, index) for index in neighbors])
    shapes = [pltpu.HBM(array.shape, array.dtype) for array in arrays]
    found = pl.pallas_call(
        _send, out_shape=(*shapes, *shapes, *[pltpu.SemaphoreType.DMA(())] * 4), in_specs=[_SCALARS, _HBM, _HBM],
        out_specs=(_HBM,) * 4 + (_SEMAPHORE,) * 4, input_output_aliases={1: 0, 2: 1}, name=SEND,
        compiler_params=pltpu.CompilerParams(collective_id=barrier, has_side_effects=True),
    )(targets, *(pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in arrays))
    return Moving(found[:2], found[2:4], found[4:])


def receive(moving: Moving) -> Sequence[jax.Array]:
    """Wait for both transfers; returns the arrays (from the previous device, from the next one)."""
    shapes = tuple(pltpu.HBM(array.shape, array.dtype) for array in moving.arriving)
    return pl.pallas_call(
        _receive, out_shape=shapes, in_specs=[_HBM] * 4 + [_SEMAPHORE] * 4, out_specs=(_HBM,) * 2,
        input_output_aliases={2: 0, 3: 1}, name=RECEIVE,
        compiler_params=pltpu.CompilerParams(has_side_effects=True),
    )(*(pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in moving.sent), *moving.arriving,
      *moving.semaphores)


def _number(axis: str, index: jax.Array) -> jax.Array:
    """Number of a device among all devices of the mesh: `index` along one axis, this device's index along the
    others."""
    number = jnp.int32(0)
    for name, size in jax.sharding.get_abstract_mesh().shape.items():
        number = number * size + (index if name == axis else jax.lax.axis_index(name))
    return number


def _send(targets_ref: Any, *refs: Any) -> None:
    arriving, semaphores = refs[4:6], refs[6:]
    here = pltpu.get_barrier_semaphore()
    # Data sent to a device that has not reached this point would overwrite its memory. So each device signals both
    # neighbors that it is ready, and continues when both have signaled. No neighbor can signal twice before that,
    # because the next step of its ring needs the data that this device sends now. A signal for the next step may
    # already be present at the end.
    for way in range(2):
        pl.semaphore_signal(here, device_id=targets_ref[way], device_id_type=pl.DeviceIdType.LOGICAL)
    pl.semaphore_wait(here, 2)
    for copy in _copies(refs[:2], arriving, semaphores, (targets_ref[0], targets_ref[1])):
        copy.start()


def _receive(*refs: Any) -> None:
    for copy in _copies(refs[:2], refs[2:4], refs[4:8], (0, 0)):  # the sender is implied by the semaphores
        copy.wait()


def _copies(sent: Sequence[Any], arriving: Sequence[Any], semaphores: Sequence[Any], targets: Sequence[Any]) -> list:
    return [pltpu.make_async_remote_copy(sent[way], arriving[way], semaphores[way], semaphores[2 + way],
                                         device_id=targets[way], device_id_type=pl.DeviceIdType.LOGICAL)
            for way in range(2)]
