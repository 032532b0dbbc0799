"""Attention for XLA: blocks of queries, each computed only against its visible keys. It saves its output and one number
per query for the backward pass (FlashAttention-2, arXiv 2307.08691). No [S, S] mask, no repeated heads.

Short sequences use an unrolled loop, in which one matmul covers all keys of a block. Long ones use `lax.scan` over
blocks of queries with an inner loop over blocks of keys, so that only one pair of blocks is in memory at a time.

Legend: B batch, S queries, T keys, N query heads, K key and value heads, G query heads of one kv head, H head dim,
R rows: the S queries of a block for each of the G heads, head by head.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ctllm_jax.gathered import vary_together
from ctllm_jax.kernels.attention.fused import NOTHING_SEEN

MASKED = NOTHING_SEEN
"""Finite, so that a fully masked query has a gradient of zero, not NaN."""
LAST = 2**30
"""The position of a key after the row's end, which no token attends to."""
UNROLLED = 1024
"""Up to this many queries the loop is unrolled; 8 blocks compile in a few seconds, more would take longer."""
LOOPED_BLOCK = 256
"""Block size of queries and keys of a long sequence: a pair of blocks of some heads fits into a CPU's cache."""


class _Setting(NamedTuple):
    """The static arguments of a call; hashable, as custom_vjp requires."""

    causal: bool
    sliding_window: int | None
    scale: float
    positions: bool
    return_lse: bool

    def first_key(self, query):
        """The first key that a query attends to."""
        return 0 if self.sliding_window is None else query - self.sliding_window + 1


def attention_xla(query_BSNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array, *, segment_ids: jax.Array | None,
                  positions: jax.Array | None, causal: bool, sliding_window: int | None, scale: float,
                  return_lse: bool = False) -> jax.Array | tuple[jax.Array, jax.Array]:
    """As `kernels.attention`."""
    setting = _Setting(causal, sliding_window, scale, positions is not None, return_lse)
    y_BSNH, lse_BSN = _attend(setting, *vary_together(query_BSNH, key_BSKH, value_BSKH, (segment_ids, positions)))
    if segment_ids is not None:
        # Up to here padding attends to padding, which costs nothing and leaves no row without a key.
        y_BSNH = jnp.where((segment_ids > 0)[:, :, None, None], y_BSNH, 0)
        if return_lse:
            lse_BSN = jnp.where((segment_ids > 0)[:, :, None], lse_BSN, NOTHING_SEEN)
    return (y_BSNH, lse_BSN) if return_lse else y_BSNH


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(setting, query_BSNH, key_BSKH, value_BSKH, ids):
    return _forward(setting, query_BSNH, key_BSKH, value_BSKH, ids)[0]


def _forward(setting, query_BSNH, key_BSKH, value_BSKH, ids):
    length = query_BSNH.shape[1]
    forward = _forward_unrolled if length <= UNROLLED else _forward_looped
    y_BSNH, log_sums = forward(setting, query_BSNH, key_BSKH, value_BSKH, ids)
    # Named for a remat policy, which can then save everything that the backward pass reads besides query, key and
    # value.
    y_BSNH = checkpoint_name(y_BSNH, "attention_output")
    log_sums = checkpoint_name(log_sums, "attention_log_sums")
    lse_BSN = _merge_log_sums(log_sums, query_BSNH.shape[2], length) if setting.return_lse else None
    return (y_BSNH, lse_BSN), (query_BSNH, key_BSKH, value_BSKH, ids, y_BSNH, log_sums)


def _backward(setting, residuals, cotangents):
    cotangent_BSNH, lse_cotangent_BSN = cotangents
    length, kv_heads = cotangent_BSNH.shape[1], residuals[1].shape[2]
    lse_cotangents = None
    if setting.return_lse:
        lse_cotangents = _split_log_sums(lse_cotangent_BSN, kv_heads)
    backward = _backward_unrolled if length <= UNROLLED else _backward_looped
    return (*backward(setting, *residuals, cotangent_BSNH, lse_cotangents), None)


_attend.defvjp(_forward, _backward)


def _matmul(x, y, *, contract: tuple[int, int]):
    """Matmul batched over the first two dims, accumulated in float32."""
    dims = ((contract[0],), (contract[1],)), ((0, 1), (0, 1))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _split_heads(x_BSNH, kv_heads: int):
    """[B, S, N, H] -> [B, K, G, S, H]."""
    batch, length, heads, head_dim = x_BSNH.shape
    return x_BSNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)


def _merge_heads(x_BKGSH):
    """[B, K, G, S, H] -> [B, S, N, H]."""
    batch, kv_heads, group, length, head_dim = x_BKGSH.shape
    return x_BKGSH.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, head_dim)


def _merge_log_sums(log_sums, heads: int, length: int):
    """Convert the per-block results of a forward pass to [B, S, N]."""
    if isinstance(log_sums, list):
        kv_heads, group = log_sums[0].shape[1], heads // log_sums[0].shape[1]
        parts = [x.reshape(*x.shape[:2], group, -1) for x in log_sums]
        lse_BKGS = jnp.concatenate(parts, axis=3)
    else:
        kv_heads, group = log_sums.shape[2], heads // log_sums.shape[2]
        lse_BKGS = from_blocks(log_sums.reshape(*log_sums.shape[:3], group, LOOPED_BLOCK), 3, length)
    return lse_BKGS.reshape(lse_BKGS.shape[0], kv_heads * group, length).swapaxes(1, 2)


def _split_log_sums(lse_BSN, kv_heads: int):
    """[B, S, N] -> [B, K, G, S]."""
    lse_BNS = lse_BSN.swapaxes(1, 2)
    return lse_BNS.reshape(lse_BNS.shape[0], kv_heads, -1, lse_BNS.shape[2])


def _mask(setting, query, key, segments, *, length: int):
    """The mask of queries and keys at these indices of a row; all arguments broadcast to [B, R, T], or to [B, T, R]."""
    mask = key <= query if setting.causal else key < length
    if setting.sliding_window is not None:
        mask &= key >= setting.first_key(query)
    return mask if segments is None else mask & (segments[0] == segments[1])


def _scores(setting, query_BKRH, key_BKTH, queries, keys, segments, *, length: int):
    """Masked scores [B, K, R, T], float32, of the queries and keys at these indices of a row, [1 or B, S] and [1 or B,
    T]."""
    group = query_BKRH.shape[2] // queries.shape[1]
    if segments is not None:
        segments = jnp.tile(segments[0], group)[:, :, None], segments[1][:, None]
    mask = _mask(setting, jnp.tile(queries, group)[:, :, None], keys[:, None], segments, length=length)
    scores_BKRT = _matmul(query_BKRH, key_BKTH, contract=(3, 3)) * setting.scale
    return jnp.where(mask[:, None], scores_BKRT, MASKED)


def _scores_transposed(setting, query_BKRH, key_BKTH, queries, keys, segments, *, length: int):
    """As `_scores`, but [B, K, T, R]: only one of the backward pass's matmuls then reads a transposed operand instead
    of two. It also prevents XLA from keeping the forward pass's scores for reuse; an optimization barrier would not,
    because XLA removes barriers on the CPU before it looks for equal computations."""
    group = query_BKRH.shape[2] // queries.shape[1]
    if segments is not None:
        segments = jnp.tile(segments[0], group)[:, None], segments[1][:, :, None]
    mask = _mask(setting, jnp.tile(queries, group)[:, None], keys[:, :, None], segments, length=length)
    scores_BKTR = _matmul(key_BKTH, query_BKRH, contract=(3, 3)) * setting.scale
    return jnp.where(mask[:, None], scores_BKTR, MASKED)


def _block_gradients(setting, scores_BKTR, query_BKRH, key_BKTH, value_BKTH, y_BKRH, log_sums_BKR, cotangent_BKRH,
                     lse_cotangent_BKR):
    """The contribution of one block of scores to the gradients of query, key and value; float32."""
    probs = jnp.exp(scores_BKTR - log_sums_BKR[:, :, None])
    # Σ_H y · dy, which is Σ_T p · dp over all keys.
    delta_BKR = jnp.sum(y_BKRH.astype(jnp.float32) * cotangent_BKRH.astype(jnp.float32), axis=-1)
    if lse_cotangent_BKR is not None:
        delta_BKR -= lse_cotangent_BKR
    slopes = _matmul(value_BKTH, cotangent_BKRH, contract=(3, 3))
    slopes = (probs * (slopes - delta_BKR[:, :, None]) * setting.scale).astype(query_BKRH.dtype)
    return (_matmul(slopes, key_BKTH, contract=(2, 2)), _matmul(slopes, query_BKRH, contract=(3, 2)),
            _matmul(probs.astype(value_BKTH.dtype), cotangent_BKRH, contract=(3, 2)))


# Unrolled: every block's index is static, so each matmul covers only the keys that its queries may attend to.


def block_size(length: int) -> int:
    """Number of queries of an unrolled block: small blocks skip more masked pairs, large blocks need fewer matmuls."""
    return 64 if length <= 256 else 128


class _Block(NamedTuple):
    """Queries start … stop-1, and the keys first … last-1 that any of them attends to."""

    start: int
    stop: int
    first: int
    last: int

    def rows(self, x_BKGSH):
        """The block's part of an array of all queries: [B, K, R, H]."""
        part = x_BKGSH[:, :, :, self.start:self.stop]
        return part.reshape(*part.shape[:2], -1, part.shape[-1])

    def unroll(self, x_BKRH):
        """The inverse of `rows`: [B, K, G, S, H]."""
        return x_BKRH.reshape(*x_BKRH.shape[:2], -1, self.stop - self.start, x_BKRH.shape[-1])

    def places(self, ids):
        """Indices of its queries and keys, and their segments."""
        segment_ids_BS, positions_BS = ids
        queries, keys = slice(self.start, self.stop), slice(self.first, self.last)
        segments = None if segment_ids_BS is None else (segment_ids_BS[:, queries], segment_ids_BS[:, keys])
        if positions_BS is not None:
            return positions_BS[:, queries], positions_BS[:, keys], segments
        return jnp.arange(self.start, self.stop)[None], jnp.arange(self.first, self.last)[None], segments


def _blocks(setting, length: int) -> list[_Block]:
    size = block_size(length)
    stops = [(start, min(start + size, length)) for start in range(0, length, size)]
    if setting.positions:
        return [_Block(start, stop, 0, length) for start, stop in stops]
    return [_Block(start, stop, max(0, setting.first_key(start)), stop if setting.causal else length)
            for start, stop in stops]


def _forward_unrolled(setting, query_BSNH, key_BSKH, value_BSKH, ids):
    length, kv_heads = key_BSKH.shape[1:3]
    query_BKGSH = _split_heads(query_BSNH, kv_heads)
    key_BKSH, value_BKSH = key_BSKH.swapaxes(1, 2), value_BSKH.swapaxes(1, 2)
    outputs, log_sums = [], []
    for block in _blocks(setting, length):
        key, value = (x[:, :, block.first:block.last] for x in (key_BKSH, value_BKSH))
        scores = _scores(setting, block.rows(query_BKGSH), key, *block.places(ids), length=length)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        exps = jnp.exp(scores - highest)
        sums = jnp.sum(exps, axis=-1, keepdims=True)
        mixed = _matmul(exps.astype(value.dtype), value, contract=(3, 2)) / sums
        outputs.append(block.unroll(mixed.astype(query_BSNH.dtype)))
        log_sums.append(jnp.squeeze(highest + jnp.log(sums), 3))
    return _merge_heads(jnp.concatenate(outputs, axis=3)), log_sums


def _backward_unrolled(setting, query_BSNH, key_BSKH, value_BSKH, ids, y_BSNH, log_sums, cotangent_BSNH,
                       lse_cotangent_BKGS):
    length, kv_heads = key_BSKH.shape[1:3]
    query_BKGSH, y_BKGSH, cotangent_BKGSH = (_split_heads(x, kv_heads) for x in (query_BSNH, y_BSNH, cotangent_BSNH))
    key_BKSH, value_BKSH = key_BSKH.swapaxes(1, 2), value_BSKH.swapaxes(1, 2)
    query_grads = []
    key_grad = value_grad = jnp.zeros(key_BKSH.shape, jnp.float32)
    for block, log_sums_BKR in zip(_blocks(setting, length), log_sums, strict=True):
        query, y, cotangent = (block.rows(x) for x in (query_BKGSH, y_BKGSH, cotangent_BKGSH))
        key, value = (x[:, :, block.first:block.last] for x in (key_BKSH, value_BKSH))
        lse_cotangent = None
        if lse_cotangent_BKGS is not None:
            lse_cotangent = lse_cotangent_BKGS[:, :, :, block.start:block.stop].reshape(log_sums_BKR.shape)
        scores = _scores_transposed(setting, query, key, *block.places(ids), length=length)
        query_part, key_part, value_part = _block_gradients(
            setting, scores, query, key, value, y, log_sums_BKR, cotangent, lse_cotangent)
        query_grads.append(block.unroll(query_part.astype(query_BSNH.dtype)))
        key_grad, value_grad = (
            jax.lax.dynamic_update_slice_in_dim(grad, grad[:, :, block.first:block.last] + part, block.first, axis=2)
            for grad, part in ((key_grad, key_part), (value_grad, value_part)))
    return (_merge_heads(jnp.concatenate(query_grads, axis=3)), key_grad.astype(key_BSKH.dtype).swapaxes(1, 2),
            value_grad.astype(value_BSKH.dtype).swapaxes(1, 2))


# Looped: one pair of blocks at a time. JAX cannot differentiate a loop with a dynamic trip count, and need not here.


def in_blocks(x, dim: int, fill=0):
    """Pad a dim to whole blocks and split it: [blocks, …, LOOPED_BLOCK, …]."""
    blocks = -(-x.shape[dim] // LOOPED_BLOCK)
    padding = [(0, blocks * LOOPED_BLOCK - x.shape[dim] if i == dim else 0) for i in range(x.ndim)]
    x = jnp.pad(x, padding, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:dim], blocks, LOOPED_BLOCK, *x.shape[dim + 1:]), dim, 0)


def from_blocks(x, dim: int, length: int):
    """The inverse of `in_blocks`."""
    x = jnp.moveaxis(x, 0, dim)
    x = x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2:])
    return jax.lax.slice_in_dim(x, 0, length, axis=dim)


def _rows_in_blocks(x_BSNH, kv_heads: int):
    """[B, S, N, H] -> [blocks, B, K, R, H]."""
    x = in_blocks(_split_heads(x_BSNH, kv_heads), 3)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _from_rows_in_blocks(x, length: int):
    """The inverse of `_rows_in_blocks`."""
    return _merge_heads(from_blocks(x.reshape(*x.shape[:3], -1, LOOPED_BLOCK, x.shape[-1]), 3, length))


def _keys_in_blocks(key_BSKH, value_BSKH, ids):
    """Keys and values [blocks, B, K, T, H], segments (-1: padding of the last block) and positions [blocks, B, T]."""
    ids = tuple(None if x is None else in_blocks(x, 1, fill=fill) for x, fill in zip(ids, (-1, LAST), strict=True))
    return *(in_blocks(x.swapaxes(1, 2), 2) for x in (key_BSKH, value_BSKH)), ids


def _seen_blocks(setting, block, blocks: int):
    """The blocks of keys that a block of queries attends to, as (first, end)."""
    if setting.positions:
        return 0, blocks
    first: jax.Array | int = 0
    if setting.sliding_window is not None:
        first = jnp.maximum(0, setting.first_key(block * LOOPED_BLOCK) // LOOPED_BLOCK)
    return first, block + 1 if setting.causal else blocks


def _pair_places(ids, block, key_block):
    """Indices of the queries of one block and the keys of another, and their segments."""
    segments, positions = (None if x is None else (x[block], x[key_block]) for x in ids)
    places = positions or ((start * LOOPED_BLOCK + jnp.arange(LOOPED_BLOCK))[None] for start in (block, key_block))
    return *places, segments


def _forward_looped(setting, query_BSNH, key_BSKH, value_BSKH, ids):
    length, kv_heads = key_BSKH.shape[1:3]
    queries = _rows_in_blocks(query_BSNH, kv_heads)
    keys, values, ids = _keys_in_blocks(key_BSKH, value_BSKH, ids)

    def over_queries(_, inputs):
        block, query = inputs

        def over_keys(key_block, carry):
            highest, sums, mixed = carry
            scores = _scores(setting, query, keys[key_block], *_pair_places(ids, block, key_block), length=length)
            new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1, keepdims=True))
            exps, decay = jnp.exp(scores - new_highest), jnp.exp(highest - new_highest)
            part = _matmul(exps.astype(values.dtype), values[key_block], contract=(3, 2))
            return new_highest, sums * decay + jnp.sum(exps, axis=-1, keepdims=True), mixed * decay + part

        ones = (*query.shape[:-1], 1)
        start, _ = vary_together((jnp.full(ones, MASKED), jnp.zeros(ones), jnp.zeros(query.shape)), query)
        highest, sums, mixed = jax.lax.fori_loop(*_seen_blocks(setting, block, len(keys)), over_keys, start)
        return None, ((mixed / sums).astype(query.dtype), jnp.squeeze(highest + jnp.log(sums), 3))

    _, (outputs, log_sums) = jax.lax.scan(over_queries, None, (jnp.arange(len(queries)), queries))
    return _from_rows_in_blocks(outputs, length), log_sums


def _backward_looped(setting, query_BSNH, key_BSKH, value_BSKH, ids, y_BSNH, log_sums, cotangent_BSNH,
                     lse_cotangent_BKGS):
    length, kv_heads = key_BSKH.shape[1:3]
    queries, outputs, cotangents = (_rows_in_blocks(x, kv_heads) for x in (query_BSNH, y_BSNH, cotangent_BSNH))
    keys, values, ids = _keys_in_blocks(key_BSKH, value_BSKH, ids)
    lse_cotangents = None
    if lse_cotangent_BKGS is not None:
        lse_cotangents = in_blocks(lse_cotangent_BKGS, 3).reshape(log_sums.shape)

    def over_queries(grads, inputs):
        block, query, *rest = inputs

        def over_keys(key_block, carry):
            query_grad, key_grads, value_grads = carry
            scores = _scores_transposed(setting, query, keys[key_block], *_pair_places(ids, block, key_block),
                                        length=length)
            query_part, key_part, value_part = _block_gradients(
                setting, scores, query, keys[key_block], values[key_block], *rest)
            return (query_grad + query_part, key_grads.at[key_block].add(key_part),
                    value_grads.at[key_block].add(value_part))

        start, _ = vary_together((jnp.zeros(query.shape), *grads), query)
        query_grad, *grads = jax.lax.fori_loop(*_seen_blocks(setting, block, len(keys)), over_keys, start)
        return tuple(grads), query_grad.astype(query.dtype)

    start, _ = vary_together((jnp.zeros(keys.shape), jnp.zeros(values.shape)), keys)
    (key_grads, value_grads), query_grads = jax.lax.scan(
        over_queries, start,
        (jnp.arange(len(queries)), queries, outputs, log_sums, cotangents, lse_cotangents))
    return (_from_rows_in_blocks(query_grads, length),
            from_blocks(key_grads, 2, length).astype(key_BSKH.dtype).swapaxes(1, 2),
            from_blocks(value_grads, 2, length).astype(value_BSKH.dtype).swapaxes(1, 2))
