"""Attention for TPU: Pallas Mosaic kernels for both passes, made for packed batches. Contract: `fused.Kernels`.

Legend: B batch, S sequence, N query heads, K kv heads, H head dim, P parts of the keys, M keys of a part.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ctllm_jax.kernels.attention.fused import Request
from ctllm_jax.kernels.attention.tpu_backward import backward_kernel
from ctllm_jax.kernels.attention.tpu_blocks import CHIPS, Blocks, check_blocks, choose_blocks, find_chip
from ctllm_jax.kernels.attention.tpu_forward import forward_kernel
from ctllm_jax.kernels.attention.tpu_ranges import BIG, KEY_PADDING, QUERY_PADDING, find_ranges

HEAD_DIMS = (64, 128, 256)
DTYPES = ("bfloat16", "float32")


def refusal(request: Request) -> str | None:
    """Return why the kernels do not support the request, or None if they do."""
    if find_chip(request.device_kind) is None:
        return f"there are no block sizes for {request.device_kind}, only for {', '.join(CHIPS)}"
    if request.head_dim not in HEAD_DIMS:
        return f"head dim {request.head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if request.dtype not in DTYPES:
        return f"the query is {request.dtype}, not one of {', '.join(DTYPES)}"
    return None


def forward(request: Request, query_BSNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array,
            segment_ids_BS: jax.Array | None, positions_BS: jax.Array | None, *, blocks: Blocks | None = None,
            interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """(y_BSNH, lse_BNS), as of `fused.Kernels`.

    Args:
      blocks: block sizes; None: those of the table for `request.device_kind`.
      interpret: as for `pl.pallas_call`.

    Raises:
      ValueError: the blocks exceed a limit of the chip.
    """
    request, chip, blocks, segment_ids_BS = _prepare(request, blocks, segment_ids_BS, query_BSNH.shape[0])
    held = blocks.key_major
    length = _padded(request.length, blocks.query, held)
    ids = _pad_ids(segment_ids_BS, positions_BS, length)
    ranges = find_ranges(request, *_tables(segment_ids_BS, positions_BS, length), length=length,
                         query_block=blocks.query, key_block=blocks.key)
    query, key, value = (_heads_first(x, length) for x in (query_BSNH, key_BSKH, value_BSKH))
    y_BNSH, lse_BN1S = forward_kernel(
        request, blocks, ranges, query, key, value, ids, vmem_limit=CHIPS[chip].vmem_limit,
        cost=_cost(request, query_BSNH.shape[0], matmuls=2), interpret=interpret)
    return y_BNSH.swapaxes(1, 2)[:, :request.length], lse_BN1S[:, :, 0, :request.length]


def backward(request: Request, query_BSNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array,
             segment_ids_BS: jax.Array | None, positions_BS: jax.Array | None, cotangent_BSNH: jax.Array,
             lse_BNS: jax.Array, delta_BNS: jax.Array, *, blocks: Blocks | None = None, interpret: Any = False
             ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return gradients of query, key and value, as in `fused.Kernels`; other arguments and errors as for `forward`."""
    request, chip, blocks, segment_ids_BS = _prepare(request, blocks, segment_ids_BS, query_BSNH.shape[0])
    held = blocks.backward_key_major
    length = _padded(request.length, blocks.backward_query, held)
    parts = length // held
    ids = _pad_ids(segment_ids_BS, positions_BS, length)
    ranges = find_ranges(request, *_tables(segment_ids_BS, positions_BS, length), length=length,
                         query_block=blocks.backward_query, key_block=blocks.backward_key)
    query, key, value, cotangent = (
        _heads_first(x, length) for x in (query_BSNH, key_BSKH, value_BSKH, cotangent_BSNH.astype(query_BSNH.dtype)))
    padding = [(0, 0), (0, 0), (0, length - request.length)]
    lse, delta = (jnp.pad(x, padding)[:, :, None] for x in (lse_BNS, delta_BNS))
    kernel = partial(backward_kernel, vmem_limit=CHIPS[chip].vmem_limit, interpret=interpret,
                     cost=_cost(request, query_BSNH.shape[0], matmuls=5, parts=parts))
    if parts == 1:
        grads = kernel(request, blocks, ranges, jnp.int32(0), query, key, value, cotangent, lse, delta, ids, None)
    else:
        def one_part(query_grad_BNSH, inputs):
            part, key_BKMH, value_BKMH, key_ids = inputs
            query_grad_BNSH, *others = kernel(
                request, blocks, ranges, part, query, key_BKMH, value_BKMH, cotangent, lse, delta,
                [(of_queries, of_keys) for (of_queries, _), of_keys in zip(ids, key_ids, strict=True)], query_grad_BNSH)
            return query_grad_BNSH, others

        in_parts = (_split(key, parts), _split(value, parts), [_split(of_keys, parts) for _, of_keys in ids])
        query_grad, others = jax.lax.scan(one_part, jnp.zeros(query.shape, jnp.float32),
                                          (jnp.arange(parts, dtype=jnp.int32), *in_parts))
        grads = query_grad, *(_merge(x) for x in others)
    query_grad, key_grad, value_grad = (grad.swapaxes(1, 2)[:, :request.length].astype(x.dtype)
                                        for grad, x in zip(grads, (query_BSNH, key_BSKH, value_BSKH), strict=True))
    return query_grad, key_grad, value_grad


def _prepare(request, blocks, segment_ids_BS, rows: int):
    """Return the request in the kernels' form, the chip, and its checked blocks."""
    chip = find_chip(request.device_kind)
    assert chip is not None, "`refusal` names a device that is no TPU"
    blocks = choose_blocks(request, chip) if blocks is None else blocks
    check_blocks(blocks, request, chip)
    if segment_ids_BS is None and not request.causal:
        # Only its segment masks the padding of a row.
        segment_ids_BS, request = jnp.ones((rows, request.length), jnp.int32), request._replace(segments=True)
    return request, chip, blocks, segment_ids_BS


def _padded(length: int, block: int, held: int) -> int:
    """Return the row's length, rounded up to whole blocks of queries and whole parts of keys."""
    unit = max(block, held)
    assert unit % min(block, held) == 0, (block, held)
    return -(-length // unit) * unit


def _heads_first(x_BSNH, length: int):
    """[B, length, N, H] -> [B, N, length, H], padded with zeros."""
    return jnp.pad(x_BSNH, [(0, 0), (0, length - x_BSNH.shape[1]), (0, 0), (0, 0)]).swapaxes(1, 2)


def _tables(segment_ids_BS, positions_BS, length: int):
    return tuple(None if x is None else jnp.pad(x, [(0, 0), (0, length - x.shape[1])], constant_values=fill)
                 for x, fill in ((segment_ids_BS, 0), (positions_BS, BIG)))


def _pad_ids(segment_ids_BS, positions_BS, length: int):
    """Return the ids that the kernels compare, a pair (of queries, of keys) for each that is given: int32 [B, 1,
    length]."""
    segments_BS, positions_BS = _tables(segment_ids_BS, positions_BS, length)
    pairs = []
    if segments_BS is not None:
        pairs.append([jnp.where(segments_BS > 0, segments_BS, padding).astype(jnp.int32)
                      for padding in (QUERY_PADDING, KEY_PADDING)])
    if positions_BS is not None:
        pairs.append([positions_BS.astype(jnp.int32)] * 2)
    return [tuple(x[:, None] for x in pair) for pair in pairs]


def _split(x, parts: int):
    """Split the second to last dim of [B, K, S, H], or the last of [B, 1, S], into parts: [P, …]."""
    dim = 2
    return jnp.moveaxis(x.reshape(*x.shape[:dim], parts, -1, *x.shape[dim + 1:]), dim, 0)


def _merge(x_PBKMH):
    """[P, B, K, M, H] -> [B, K, S, H]."""
    x_BKPMH = jnp.moveaxis(x_PBKMH, 0, 2)
    return x_BKPMH.reshape(*x_BKPMH.shape[:2], -1, x_BKPMH.shape[4])


def _cost(request: Request, rows: int, *, matmuls: int, parts: int = 1) -> pl.CostEstimate:
    """The cost estimate for XLA, which cannot look into a kernel; computed as if there were one segment."""
    flops, moved = count_work(request, rows, matmuls=matmuls)
    return pl.CostEstimate(flops=flops // parts, transcendentals=flops // (2 * matmuls * request.head_dim * parts),
                           bytes_accessed=moved // parts)


def count_work(request: Request, rows: int, *, matmuls: int) -> tuple[int, int]:
    """Return (FLOPs, bytes) of a pass over the pairs that `causal` and the window allow, with each array moved once.

    The forward pass has 2 matmuls, the backward pass 5.
    """
    window = request.sliding_window
    if window is not None:
        seen = request.length * min(request.length, window)
    else:
        seen = request.length * (request.length + 1) // 2 if request.causal else request.length**2
    row = rows * request.length * request.head_dim * (4 if request.dtype == "float32" else 2)
    # Query and output, key and value; then query, cotangent and a gradient, key and value and their gradients.
    arrays = 2 * request.heads + 2 * request.kv_heads if matmuls == 2 else 3 * request.heads + 4 * request.kv_heads
    return 2 * matmuls * rows * request.heads * seen * request.head_dim, row * arrays
