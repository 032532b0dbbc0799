"""Resources of a Hopper multiprocessor, and the setup of kernels for it; shared by attention and SwiGLU.

A thread block of these kernels has two or three compute *groups* and one producer group. A group is a warpgroup of 128
threads. A compute group processes 64 rows, the height of one wgmma instruction; the producer group issues TMA copies of
tiles.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from jax import lax

ROWS = 64
"""Rows of a group."""
SHARED_BYTES = 227 * 1024
"""Shared memory that one block can have."""
RESERVED_BYTES = 2048 + 256
"""The part reserved for the compiler: scratch of reductions, and barriers."""
COMPUTE_REGISTERS = {2: 240, 3: 160}
"""Number of compute groups -> registers per thread in them. A block has 504 (with two groups) or 512 (with three) for
one thread of each group; a request for more never returns."""
COPY_REGISTERS = {2: 24, 3: 32}
"""Number of compute groups -> registers per thread of the producer group."""
SPARE_REGISTERS = 32
"""Registers for addresses, row statistics and loop state, in addition to the arrays that a kernel counts itself."""


def is_hopper(device_kind: str) -> bool:
    """Whether `jax.Device.device_kind` is one of H20, H100, H200, H800, GH200."""
    return re.search(r"\bG?H(20|100|200|800)\b", device_kind) is not None


def tiled() -> tuple:
    """Transforms of a tile of 16-bit numbers in shared memory as wgmma reads it: 8 rows by 128 bytes, swizzled."""
    # Imported here, so that a check whether a device is a Hopper GPU stays fast.
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)


def slot_of(count: jax.Array, stages: int) -> jax.Array:
    """Index of the ring buffer's stage that holds the count-th tile; a signed remainder would take several
    instructions."""
    if stages & (stages - 1):
        return lax.rem(count, jnp.int32(stages))
    return lax.bitwise_and(count, jnp.int32(stages - 1))


def compiler_params():
    """Approximate exp2 (2 ulp), and the lowering that infers layouts, which is JAX's default from 0.11 on."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def aligned(size: int) -> int:
    """Bytes of an array in shared memory; each array starts at a multiple of 1,024."""
    return -(-size // 1024) * 1024


def check_shared_bytes(what: str, needed: int) -> None:
    """Raises ValueError if a block's tiles do not fit."""
    if needed > SHARED_BYTES - RESERVED_BYTES:
        raise ValueError(f"{what} needs {needed} bytes of shared memory, and a block has {SHARED_BYTES} less"
                         f" {RESERVED_BYTES} for barriers and scratch: take smaller blocks or fewer stages")


def check_registers(what: str, needed: int, *, groups: int) -> None:
    """Raise ValueError if a thread's arrays leave too few registers for the rest."""
    held = COMPUTE_REGISTERS[groups]
    if needed + SPARE_REGISTERS > held:
        raise ValueError(f"{what} needs {needed} registers a thread for its arrays and about {SPARE_REGISTERS} more,"
                         f" and with {groups} computing groups a thread has {held}: take smaller blocks, or fewer"
                         " groups")


def check_multiple(what: str, size: int, of: int) -> None:
    """Raises ValueError if a size is not a positive multiple."""
    if size <= 0 or size % of:
        raise ValueError(f"{what} is {size}, and must be a positive multiple of {of}")
