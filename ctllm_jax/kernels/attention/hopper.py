"""Attention for Hopper GPUs (H100, H200, GH200), in Pallas Mosaic GPU: its requirements and its two passes.

Legend: B batch, S sequence, N query heads, K key and value heads, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ctllm_jax.kernels.attention.fused import NOTHING_SEEN, Request
from ctllm_jax.kernels.attention.hopper_backward import attention_backward
from ctllm_jax.kernels.attention.hopper_blocks import HopperBlocks
from ctllm_jax.kernels.attention.hopper_forward import attention_forward
from ctllm_jax.kernels.hopper import is_hopper

DEFAULT_BLOCKS = HopperBlocks()
FASTEST: frozenset[tuple[int, str, bool]] = frozenset()
"""(head dim, dtype, segments) for which these kernels were measured to be faster than cuDNN and XLA, so that "auto"
chooses them. Empty: the kernels are compiled and simulated, but not measured yet."""


def refusal(request: Request) -> str | None:
    """Return why these kernels do not support the request, or None if they do."""
    if request.platform != "gpu" or not is_hopper(request.device_kind):
        return f"its GPU kernels are for Hopper (H100, H200), and this is {request.device_kind}"
    if request.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 and float16, and the query is {request.dtype}"
    if request.positions:
        return "it compares places in the row, and no positions"
    if request.scale <= 0:
        return f"it takes the largest score before scaling, so that scale={request.scale} must be positive"
    if request.head_dim % 64:
        return f"head dim {request.head_dim} is not a multiple of 64"
    try:
        DEFAULT_BLOCKS.check(request.head_dim)
    except ValueError as error:
        return str(error)
    return None


def is_fastest(request: Request) -> bool:
    """Return whether measurements show that "auto" should choose these kernels."""
    return (request.head_dim, request.dtype, request.segments) in FASTEST


def forward(request: Request, query_BSNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array,
            segment_ids_BS: jax.Array | None, positions_BS: jax.Array | None = None, *,
            blocks: HopperBlocks = DEFAULT_BLOCKS) -> tuple[jax.Array, jax.Array]:
    """As `fused.Kernels.forward`.

    Raises:
      ValueError: blocks that do not fit a multiprocessor.
    """
    blocks.check(request.head_dim)
    (query, key, value), segments, length = _room_for_a_block(
        (query_BSNH, key_BSKH, value_BSKH), segment_ids_BS, blocks=blocks)
    y_BSNH, lse_BNS = attention_forward(query, key, value, segments, causal=request.causal,
                                        sliding_window=request.sliding_window, scale=request.scale, blocks=blocks,
                                        nothing_seen=NOTHING_SEEN)
    return y_BSNH[:, :length], lse_BNS[:, :, :length]


def backward(request: Request, query_BSNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array,
             segment_ids_BS: jax.Array | None, positions_BS: jax.Array | None, cotangent_BSNH: jax.Array,
             lse_BNS: jax.Array, delta_BNS: jax.Array, *, blocks: HopperBlocks = DEFAULT_BLOCKS
             ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `fused.Kernels.backward`.

    Raises:
      ValueError: blocks that do not fit a multiprocessor.
    """
    blocks.check(request.head_dim)
    (query, key, value, cotangent), segments, length = _room_for_a_block(
        (query_BSNH, key_BSKH, value_BSKH, cotangent_BSNH), segment_ids_BS, blocks=blocks)
    room = ((0, 0), (0, 0), (0, query.shape[1] - length))
    grads = attention_backward(query, key, value, segments, cotangent, jnp.pad(lse_BNS, room),
                               jnp.pad(delta_BNS, room), causal=request.causal, sliding_window=request.sliding_window,
                               scale=request.scale, blocks=blocks)
    query_grad, key_grad, value_grad = (grad[:, :length] for grad in grads)
    return query_grad, key_grad, value_grad


def _room_for_a_block(arrays: tuple[jax.Array, ...], segment_ids_BS: jax.Array | None, *, blocks: HopperBlocks):
    """Return (arrays, segment_ids, true length), padded if TMA requires it. TMA reads tiles of 8 rows, and no tile
    longer than its array; all other lengths need no padding and no copy."""
    batch, length = arrays[0].shape[:2]
    wanted = max(-(-length // 8) * 8, blocks.padded(1))
    if length == wanted:
        return arrays, segment_ids_BS, length
    if segment_ids_BS is None:
        segment_ids_BS = jnp.ones((batch, length), jnp.int32)
    room = ((0, 0), (0, wanted - length))
    return (tuple(jnp.pad(x, (*room, (0, 0), (0, 0))) for x in arrays), jnp.pad(segment_ids_BS, room), length)
