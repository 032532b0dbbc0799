"""Block sizes of the Hopper kernels, and which blocks of keys a block of queries interacts with.

Legend: B batch, S sequence, P the sequence padded to whole blocks, R blocks of rows, C blocks of columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ctllm_jax.kernels.hopper import (
    COMPUTE_REGISTERS,
    ROWS,
    aligned,
    check_multiple,
    check_registers,
    check_shared_bytes,
)

NO_QUERY = -1
"""Segment of a padding query; a padding key has 0, so that padding never matches padding."""


@dataclass(frozen=True)
class HopperBlocks:
    """Block sizes of the three kernels; a block has 64 rows per compute group.

    Attributes:
      forward_groups, forward_keys, forward_stages: groups of queries, keys of a step, steps in flight.
      dkv_groups, dkv_queries, dkv_stages: of the gradients of keys and values: groups of keys, queries of a step.
      dq_groups, dq_keys, dq_stages: of the gradient of queries.
      alternate: the forward groups issue their matmuls in turns, so that one group's softmax overlaps the other's
        matmuls.
    """

    forward_groups: int = 2
    forward_keys: int = 128
    forward_stages: int = 2
    dkv_groups: int = 2
    dkv_queries: int = 64
    dkv_stages: int = 2
    dq_groups: int = 2
    dq_keys: int = 64
    dq_stages: int = 3
    alternate: bool = True

    def check(self, head_dim: int) -> None:
        """Raise ValueError that names the limit that these sizes exceed at a head dim."""
        for name in ("forward", "dkv", "dq"):
            groups, step, stages = self.of(name)
            if groups not in COMPUTE_REGISTERS:
                raise ValueError(f"{name}_groups is {groups}, and must be one of"
                                 f" {', '.join(map(str, COMPUTE_REGISTERS))}")
            check_multiple(f"{name}_{'queries' if name == 'dkv' else 'keys'}", step, 64)
            if step > 256:
                raise ValueError(f"a step of the {name} kernel is {step} wide, and a matrix instruction 256 at most")
            if stages < 2:
                raise ValueError(f"{name}_stages is {stages}, and must be at least 2: one is computed, one is loaded")
            check_registers(f"the {name} kernel at head dim {head_dim}", self.registers(name, head_dim), groups=groups)
            check_shared_bytes(f"the {name} kernel at head dim {head_dim}", self.shared_bytes(name, head_dim))

    def of(self, kernel: str) -> tuple[int, int, int]:
        """(groups, columns of a step, stages) of "forward", "dkv" or "dq"."""
        step = "queries" if kernel == "dkv" else "keys"
        return tuple(getattr(self, f"{kernel}_{name}") for name in ("groups", step, "stages"))

    def rows(self, kernel: str) -> int:
        """Queries of one block, or of "dkv" keys."""
        return self.of(kernel)[0] * ROWS

    def registers(self, kernel: str, head_dim: int) -> int:
        """Number of registers for a thread's arrays: a float32 array of 64 rows needs half as many as it has
        columns."""
        _, step, _ = self.of(kernel)
        arrays = {"forward": step + head_dim + step // 2,  # scores, output; probabilities in 16 bits
                  "dkv": 2 * step + 2 * head_dim + step // 2, "dq": 2 * step + head_dim + step // 2}
        return arrays[kernel] // 2

    def shared_bytes(self, kernel: str, head_dim: int) -> int:
        """Bytes of a block's tiles and of the per-row values: segments, lse, delta."""
        groups, step, stages = self.of(kernel)
        held_tiles, held_numbers, streamed_numbers = {"forward": (1, 2, 1), "dkv": (2, 1, 3), "dq": (2, 3, 1)}[kernel]
        return (held_tiles * aligned(groups * ROWS * head_dim * 2) + held_numbers * aligned(groups * ROWS * 4)
                + 2 * aligned(stages * step * head_dim * 2) + streamed_numbers * aligned(stages * step * 4))

    def padded(self, length: int) -> int:
        """Return the length, rounded up to whole blocks of all kernels."""
        whole = math.lcm(*(size for name in ("forward", "dkv", "dq") for size in (self.rows(name), self.of(name)[1])))
        return -(-length // whole) * whole


def padded_ids(segment_ids_BS: jax.Array | None, *, batch: int, length: int, padded: int
               ) -> tuple[jax.Array, jax.Array]:
    """Return segments of queries and of keys, int32 [B, P]; a query may attend to a key if they are equal."""
    if segment_ids_BS is None:
        segment_ids_BS = jnp.ones((batch, length), jnp.int32)
    keys_BP = jnp.pad(segment_ids_BS.astype(jnp.int32), ((0, 0), (0, padded - length)))
    keys_BP = jnp.maximum(keys_BP, 0)
    return jnp.where(keys_BP > 0, keys_BP, NO_QUERY), keys_BP


def visible_blocks(segment_ids_BP: jax.Array, *, query_block: int, key_block: int, causal: bool,
                   sliding_window: int | None, by_key: bool = False) -> jax.Array:
    """Return for each block of queries its range of key blocks; with `by_key`, for each block of keys its range of
    query blocks.

    Args:
      segment_ids_BP: int32 [B, P], 0 for padding; P is a multiple of both blocks.

    Returns:
      int32 [B, R, 4]: first, whole_first, whole_end, end. Rows interact with columns first … end-1, at least one (a
      block of padding gets one, which is fully masked). In whole_first … whole_end-1 no pair is masked. Segments are
      compared by their range in a block, so a column block may be included unnecessarily, but none is missed.
    """
    batch, length = segment_ids_BP.shape
    lowest, highest, whole, starts, stops = [], [], [], [], []
    for size in (query_block, key_block):
        ids = segment_ids_BP.reshape(batch, length // size, size)
        lowest.append(jnp.min(jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).max), axis=2))
        highest.append(jnp.max(ids, axis=2))
        whole.append(jnp.min(ids, axis=2))
        starts.append(jnp.arange(length // size) * size)
        stops.append((jnp.arange(length // size) + 1) * size - 1)
    # [B, query blocks, key blocks]
    meets = (jnp.maximum(lowest[0][:, :, None], lowest[1][:, None])
             <= jnp.minimum(highest[0][:, :, None], highest[1][:, None]))
    one = (whole[0] > 0) & (whole[0] == highest[0])
    sees_all = one[:, :, None] & (whole[0][:, :, None] == whole[1][:, None]) & (whole[0][:, :, None]
                                                                              == highest[1][:, None])
    if causal:
        meets &= (starts[1][None, None] <= stops[0][None, :, None])
        sees_all &= (stops[1][None, None] <= starts[0][None, :, None])
    if sliding_window is not None:
        meets &= (stops[1][None, None] > starts[0][None, :, None] - sliding_window)
        sees_all &= (starts[1][None, None] > stops[0][None, :, None] - sliding_window)
    if by_key:
        meets, sees_all = meets.swapaxes(1, 2), sees_all.swapaxes(1, 2)
    first, end = _run(meets, to_the_last=True)
    whole_first, whole_end = _run(sees_all & meets, to_the_last=False)
    end = jnp.maximum(end, first + 1)
    return jnp.stack([first, whole_first, whole_end, end], axis=2).astype(jnp.int32)


def _run(flags_BRC: jax.Array, *, to_the_last: bool) -> tuple[jax.Array, jax.Array]:
    """Return (first, end) of the columns that are set, up to the last one or to the first gap; (0, 0) if there are
    none."""
    columns = flags_BRC.shape[2]
    some = jnp.any(flags_BRC, axis=2)
    first = jnp.argmax(flags_BRC, axis=2)
    if to_the_last:
        end = columns - jnp.argmax(flags_BRC[:, :, ::-1], axis=2)
    else:
        gap = ~flags_BRC & (jnp.arange(columns)[None, None] > first[:, :, None])
        end = jnp.where(jnp.any(gap, axis=2), jnp.argmax(gap, axis=2), columns)
    return jnp.where(some, first, 0), jnp.where(some, end, 0)
