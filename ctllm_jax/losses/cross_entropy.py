"""Cross-entropy from hidden states and the head, a chunk of tokens at a time: [B, S, V] logits are never stored.

The loss is a sum, so each chunk's gradient is known up to one factor as soon as its logits are. When the loss is
differentiated, the forward pass therefore computes the gradients too, with three matmuls per chunk where recomputation
would need four. Log-probabilities of single tokens are inputs of another function; their gradient is that of the loss
with the incoming cotangents as weights, and needs the fourth matmul.

Legend: B batch, S sequence, T tokens, C tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ctllm_jax.config.axes import FSDP, TENSOR, find_batch_axes
from ctllm_jax.gathered import Rings, RingsName, find_rings, gather, scatter_sum, vary_together

MASKED = -1e30


class Options(TypedDict, total=False):
    """The options of `token_logps`."""

    chunk_size: int
    vocab_size: int | None
    mesh: Mesh | None
    batch_axes: Sequence[str] | None
    fsdp_axis: str | None
    tensor_axis: str | None
    rings: RingsName


class _Setting(NamedTuple):
    """The static arguments of a call; hashable, as custom_vjp requires."""

    z_loss: float
    chunk_size: int
    vocab_size: int
    mesh: Mesh | None
    batch_axes: tuple[str, ...]
    fsdp_axis: str | None
    tensor_axis: str | None
    rings: Rings


def chunked_cross_entropy(hidden_BSD: jax.Array, head_DV: jax.Array, targets_BS: jax.Array, weights_BS: jax.Array, *,
                          z_loss: float = 0.0, chunk_size: int = 4096, vocab_size: int | None = None,
                          mesh: Mesh | None = None, batch_axes: Sequence[str] | None = None,
                          fsdp_axis: str | None = FSDP, tensor_axis: str | None = TENSOR, rings: RingsName = "auto"
                          ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Weighted sum of -log p(target), with z-loss (PaLM, arXiv 2204.02311).

    Args:
      hidden_BSD: float32 or bfloat16; the matmuls use its dtype and accumulate in float32.
      head_DV: float32.
      targets_BS: int32 in [0, vocab_size).
      weights_BS: float32; not differentiated.
      z_loss: factor on the squared log-normaliser, which is part of the loss.
      chunk_size: number of tokens per device whose logits are in memory at once.
      vocab_size: columns from this index on are padding and get no probability; None: V.
      mesh: hidden, targets and weights are split over `batch_axes` in dim 0, the head over `fsdp_axis` and
        `tensor_axis`; None: one device. Inside another shard_map, call it without a mesh.
      batch_axes: None: those of replica, data and fsdp that the mesh has.
      rings: how the head's gradient is summed over `fsdp_axis`, as of `gathered.find_rings`.

    Returns:
      (sum of loss, sum of weights, {"z_loss": its part of the sum, for logging}), float32 scalars over the
      whole batch. Reverse-mode differentiable in hidden and head; no forward mode.

    Raises:
      ValueError: shapes or dtypes do not match, a number is out of range, or the mesh lacks an axis.
    """
    setting = _make_setting(hidden_BSD, head_DV, targets_BS, weights_BS, z_loss=z_loss, chunk_size=chunk_size,
                            vocab_size=vocab_size, mesh=mesh, batch_axes=batch_axes, fsdp_axis=fsdp_axis,
                            tensor_axis=tensor_axis, rings=rings)
    loss, weight, z_part = _loss(setting, *vary_together(hidden_BSD, head_DV, targets_BS, weights_BS))
    return loss, weight, {"z_loss": jax.lax.stop_gradient(z_part)}


def token_logps(hidden_BSD: jax.Array, head_DV: jax.Array, targets_BS: jax.Array, *, chunk_size: int = 4096,
                vocab_size: int | None = None, mesh: Mesh | None = None,
                batch_axes: Sequence[str] | None = None, fsdp_axis: str | None = FSDP,
                tensor_axis: str | None = TENSOR, rings: RingsName = "auto") -> jax.Array:
    """log p(target) of each token, float32 [B, S], split over the mesh as the targets are.

    Arguments and errors are those of `chunked_cross_entropy`. Reverse-mode differentiable in hidden and head; no
    forward mode. The backward pass computes each chunk's logits again.
    """
    setting = _make_setting(hidden_BSD, head_DV, targets_BS, targets_BS, z_loss=0.0, chunk_size=chunk_size,
                            vocab_size=vocab_size, mesh=mesh, batch_axes=batch_axes, fsdp_axis=fsdp_axis,
                            tensor_axis=tensor_axis, rings=rings)
    return _logps(setting, *vary_together(hidden_BSD, head_DV, targets_BS))


def _make_setting(hidden_BSD, head_DV, targets_BS, weights_BS, *, z_loss, chunk_size, vocab_size, mesh, batch_axes,
                  fsdp_axis, tensor_axis, rings) -> _Setting:
    """Check the arguments and return the static ones. Raises ValueError."""
    for name, array in (("hidden", hidden_BSD), ("head", head_DV)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"cross-entropy: {name} is {array.dtype.name} and must be float32 or bfloat16")
    if not jnp.issubdtype(targets_BS.dtype, jnp.integer):
        raise ValueError(f"cross-entropy: targets are {targets_BS.dtype.name} and must be integers")
    if hidden_BSD.ndim < 1 or head_DV.ndim != 2 or not head_DV.size:
        raise ValueError(f"cross-entropy: hidden {hidden_BSD.shape} must be [..., D], and head {head_DV.shape} [D, V],"
                         " neither of them 0")
    if chunk_size < 1:
        raise ValueError(f"cross-entropy: chunk_size={chunk_size} must be at least 1")
    if vocab_size is not None and not 1 <= vocab_size <= head_DV.shape[1]:
        raise ValueError(f"cross-entropy: vocab_size={vocab_size} must be from 1 to the {head_DV.shape[1]} columns of"
                         " the head")
    hidden = hidden_BSD.shape[-1]
    if hidden_BSD.shape[:-1] != targets_BS.shape or targets_BS.shape != weights_BS.shape or head_DV.shape[0] != hidden:
        raise ValueError(f"cross-entropy: targets {targets_BS.shape} and weights {weights_BS.shape} must have the shape"
                         f" of hidden {hidden_BSD.shape} without its last dim, and head {head_DV.shape} be"
                         f" [{hidden}, V]")
    if batch_axes is None:
        batch_axes = find_batch_axes(mesh.axis_names) if mesh is not None else ()
    if mesh is not None:
        missing = [axis for axis in (*batch_axes, fsdp_axis, tensor_axis) if axis and axis not in mesh.axis_names]
        if missing:
            raise ValueError(f"cross-entropy: the mesh has the axes {', '.join(mesh.axis_names)},"
                             f" and no {', '.join(missing)}")
        if fsdp_axis and fsdp_axis not in batch_axes:
            raise ValueError(f"cross-entropy: fsdp_axis={fsdp_axis!r} must be one of batch_axes={tuple(batch_axes)}")
    mesh = None if mesh is None or mesh.size == 1 else mesh
    return _Setting(float(z_loss), chunk_size, vocab_size or head_DV.shape[1], mesh, tuple(batch_axes), fsdp_axis,
                    tensor_axis, find_rings(mesh, fsdp_axis, rings) if mesh and fsdp_axis else Rings())


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(setting, hidden_BSD, head_DV, targets_BS, weights_BS):
    return _compute(setting, hidden_BSD, head_DV, targets_BS, weights_BS, want="sums")


def _forward(setting, hidden_BSD, head_DV, targets_BS, weights_BS):
    *sums, hidden_grad, head_grad = _compute(setting, hidden_BSD, head_DV, targets_BS, weights_BS, want="grads")
    return tuple(sums), (hidden_grad, head_grad)


def _backward(setting, residuals, cotangents):
    hidden_grad_BSD, head_grad_DV = residuals
    factor = cotangents[0]
    return (hidden_grad_BSD * factor.astype(hidden_grad_BSD.dtype), head_grad_DV * factor, None, None)


_loss.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logps(setting, hidden_BSD, head_DV, targets_BS):
    weights_BS = jnp.ones(targets_BS.shape, jnp.float32)
    return _compute(setting, hidden_BSD, head_DV, targets_BS, weights_BS, want="logps")


def _logps_forward(setting, hidden_BSD, head_DV, targets_BS):
    return _logps(setting, hidden_BSD, head_DV, targets_BS), (hidden_BSD, head_DV, targets_BS)


def _logps_backward(setting, residuals, cotangents_BS):
    *_, hidden_grad_BSD, head_grad_DV = _compute(setting, *residuals, -cotangents_BS, want="grads")
    return hidden_grad_BSD, head_grad_DV, None


_logps.defvjp(_logps_forward, _logps_backward)


def _compute(setting: _Setting, hidden_BSD, head_DV, targets_BS, weights_BS, *, want: str):
    """Compute on the mesh, or on one device.

    `want`: "sums" gives (loss, weight, z part), "grads" these and the gradients of loss, "logps" log p(target) [B, S].
    """
    if setting.mesh is None:
        return _local(setting, hidden_BSD, head_DV, targets_BS, weights_BS, want=want, sharded=False)
    batch = PartitionSpec(setting.batch_axes)
    head = PartitionSpec(setting.fsdp_axis, setting.tensor_axis)
    scalar = PartitionSpec()
    # check_vma can be off because nothing is differentiated through this shard_map: the sums below are explicit.
    return jax.shard_map(
        partial(_local, setting, want=want, sharded=True), mesh=setting.mesh, in_specs=(batch, head, batch, batch),
        out_specs={"sums": (scalar,) * 3, "grads": (scalar,) * 3 + (batch, head), "logps": batch}[want],
        check_vma=False)(hidden_BSD, head_DV, targets_BS, weights_BS)


def _local(setting: _Setting, hidden_BSD, head_DV, targets_BS, weights_BS, *, want: str, sharded: bool):
    with_grads = want == "grads"
    tensor_axis = setting.tensor_axis if sharded else None
    fsdp_axis = setting.fsdp_axis if sharded else None
    rings = setting.rings if sharded else Rings()
    head_dtype, hidden_dim = head_DV.dtype, hidden_BSD.shape[-1]
    head_DV = head_DV.astype(hidden_BSD.dtype)
    if fsdp_axis:
        # Once, outside the chunk loop, and in the matmul's dtype: half the bytes.
        head_DV = gather(head_DV, fsdp_axis, dim=0, rings=rings)
    tokens = targets_BS.size
    chunks = max(1, -(-tokens // setting.chunk_size))
    size = -(-tokens // chunks)
    padding = chunks * size - tokens

    def split(x, *rest):
        return jnp.pad(x.reshape(tokens, *rest), [(0, padding)] + [(0, 0)] * len(rest)).reshape(chunks, size, *rest)

    per_chunk = (split(hidden_BSD, hidden_dim), split(targets_BS), split(weights_BS.astype(jnp.float32)))
    first = jax.lax.axis_index(tensor_axis) * head_DV.shape[1] if tensor_axis else 0
    rows = hidden_dim // math.prod(rings.sizes)  # of the head's gradient that a device holds while it adds up chunks

    def step(carry, chunk):
        sums, head_grad_DV = carry
        new_sums, logps_C, hidden_grad_CD, chunk_head_grad_DV = _chunk(
            setting, *chunk, head_DV, first=first, tensor_axis=tensor_axis, with_grads=with_grads, rings=rings)
        if with_grads:
            head_grad_DV = head_grad_DV + chunk_head_grad_DV
        return (sums + new_sums, head_grad_DV), logps_C if want == "logps" else hidden_grad_CD

    start = (jnp.zeros(3, jnp.float32), jnp.zeros((rows, head_DV.shape[1]), jnp.float32) if with_grads else None)
    start, _ = vary_together(start, hidden_BSD)
    if chunks == 1:
        (sums, head_grad_DV), per_token = step(start, jax.tree.map(lambda x: x[0], per_chunk))
    else:
        (sums, head_grad_DV), per_token = jax.lax.scan(step, start, per_chunk)
    if want == "logps":
        return per_token.reshape(chunks * size)[:tokens].reshape(targets_BS.shape)
    if sharded:
        sums = jax.lax.psum(sums, setting.batch_axes)
    if not with_grads:
        return sums[0], sums[1], sums[2]
    hidden_grad_BSD = per_token.reshape(chunks * size, hidden_dim)[:tokens].reshape(hidden_BSD.shape)
    if sharded:
        others = tuple(axis for axis in setting.batch_axes if axis != fsdp_axis)
        if fsdp_axis and not rings:
            # Before the sum over the other axes, which then transfers only this device's part.
            head_grad_DV = jax.lax.psum_scatter(head_grad_DV, fsdp_axis, scatter_dimension=0, tiled=True)
        if others:
            head_grad_DV = jax.lax.psum(head_grad_DV, others)
    return sums[0], sums[1], sums[2], hidden_grad_BSD, head_grad_DV.astype(head_dtype)


def _chunk(setting: _Setting, hidden_CD, targets_C, weights_C, head_DV, *, first, tensor_axis, with_grads: bool,
           rings: Rings):
    """One chunk: its [loss, weight, z part], its tokens' log p, the gradients of its loss (None if not requested).

    `first` is the id of this device's first column; sums over the vocabulary include `tensor_axis`. With `rings`, the
    head's gradient is this device's part of the sum over fsdp, which is communicated around the rings while it is
    computed.
    """
    def over_vocab(reduce, x):
        return reduce(x, tensor_axis) if tensor_axis else x

    logits_CV = jnp.dot(hidden_CD, head_DV, preferred_element_type=jnp.float32)
    columns_1V = first + jnp.arange(logits_CV.shape[1])[None]
    if setting.vocab_size < head_DV.shape[1] * (jax.lax.axis_size(tensor_axis) if tensor_axis else 1):
        logits_CV = jnp.where(columns_1V < setting.vocab_size, logits_CV, MASKED)
    highest_C1 = over_vocab(jax.lax.pmax, jnp.max(logits_CV, axis=1, keepdims=True))
    exps_CV = jnp.exp(logits_CV - highest_C1)
    sums_C1 = over_vocab(jax.lax.psum, jnp.sum(exps_CV, axis=1, keepdims=True))
    log_normalizer_C = (jnp.log(sums_C1) + highest_C1)[:, 0]
    is_target_CV = columns_1V == targets_C[:, None]
    target_C = over_vocab(jax.lax.psum, jnp.sum(jnp.where(is_target_CV, logits_CV, 0), axis=1))
    z_C = setting.z_loss * jnp.square(log_normalizer_C)
    logps_C = target_C - log_normalizer_C
    losses_C = z_C - logps_C
    sums = jnp.stack([jnp.sum(weights_C * losses_C), jnp.sum(weights_C), jnp.sum(weights_C * z_C)])
    if not with_grads:
        return sums, logps_C, None, None
    # d loss / d logits = w · (p · (1 + 2 z · log Z) - [column is the target])
    slope_C1 = (weights_C * (1 + 2 * setting.z_loss * log_normalizer_C))[:, None] / sums_C1
    logits_grad_CV = (exps_CV * slope_C1 - jnp.where(is_target_CV, weights_C[:, None], 0)).astype(hidden_CD.dtype)
    hidden_grad_CD = jnp.dot(logits_grad_CV, head_DV.T, preferred_element_type=jnp.float32)
    if rings:
        assert setting.fsdp_axis is not None, "there are rings of an axis alone"

        def block(start, size, half):
            rows_CD = jax.lax.dynamic_slice_in_dim(hidden_CD, start, size, 1)
            return jnp.dot(rows_CD.T, logits_grad_CV[:, half], preferred_element_type=jnp.float32)
        head_grad_DV = scatter_sum(block, size=hidden_CD.shape[1], other=head_DV.shape[1], axis=setting.fsdp_axis,
                                   dim=0, rings=rings)
    else:
        head_grad_DV = jnp.dot(hidden_CD.T, logits_grad_CV, preferred_element_type=jnp.float32)
    return sums, logps_C, over_vocab(jax.lax.psum, hidden_grad_CD).astype(hidden_CD.dtype), head_grad_DV
