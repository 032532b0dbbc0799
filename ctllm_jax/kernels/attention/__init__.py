"""Attention on packed batches: causal, grouped heads, segment ids, positions, sliding window."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ctllm_jax.config.axes import TENSOR, find_batch_axes
from ctllm_jax.kernels.attention.cached import cached_attention
from ctllm_jax.kernels.attention.fused import NOTHING_SEEN, Kernels, Request, fused_attention
from ctllm_jax.kernels.attention.general import attention_general
from ctllm_jax.kernels.attention.xla import attention_xla
from ctllm_jax.kernels.dispatch import CannotRun, Name, choose, find_device
from ctllm_jax.kernels.hopper import is_hopper

__all__ = ["attention", "cached_attention", "chosen", "make_request"]


def make_request(*, length: int, heads: int, kv_heads: int, head_dim: int, dtype: str = "bfloat16", causal: bool = True,
                 sliding_window: int | None = None, scale: float | None = None, segments: bool = True,
                 positions: bool = False, lse: bool = False, mesh: Mesh | None = None) -> Request:
    """Build the request that `attention` sends to an implementation, for the mesh's devices or the default device."""
    scale = head_dim**-0.5 if scale is None else float(scale)
    return Request(length, heads, kv_heads, head_dim, dtype, causal, sliding_window, scale, segments, positions,
                   *find_device(mesh), lse)


def chosen(implementation: Name = "auto", *, mesh: Mesh | None = None, request: Request | None = None) -> str:
    """Name the implementation that `attention` uses for a request; without one, for any supported arguments.

    Raises:
      ValueError: the named implementation cannot run there, or does not support the request.
    """
    platform, device_kind = (request.platform, request.device_kind) if request else find_device(mesh)
    # Fastest first.
    reasons = {"pallas": _pallas_refusal(platform, device_kind, request), "cudnn": _cudnn_refusal(platform, request),
               "xla": None}
    if platform == "gpu" and not _fastest_on_gpu(request):
        # After XLA, which supports everything: "auto" never chooses it, but it can be named.
        reasons = {name: reasons[name] for name in ("cudnn", "xla", "pallas")}
    return choose("attention", implementation, reasons=reasons, platform=platform)


class Options(TypedDict, total=False):
    """The options of `attention` beside `return_lse`, which decides what it returns."""

    bias: jax.Array | None
    segment_ids: jax.Array | None
    kv_segment_ids: jax.Array | None
    positions: jax.Array | None
    kv_positions: jax.Array | None
    causal: bool
    sliding_window: int | None
    scale: float | jax.Array | None
    implementation: Name
    mesh: Mesh | None
    batch_axes: Sequence[str] | None
    tensor_axis: str | None


@overload
def attention(query_BSNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array, *,
              return_lse: Literal[False] = False, **options: Unpack[Options]) -> jax.Array: ...


@overload
def attention(query_BSNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array, *,
              return_lse: Literal[True], **options: Unpack[Options]) -> tuple[jax.Array, jax.Array]: ...


def attention(query_BSNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array, *, bias: jax.Array | None = None,
              segment_ids: jax.Array | None = None, kv_segment_ids: jax.Array | None = None,
              positions: jax.Array | None = None, kv_positions: jax.Array | None = None, causal: bool = True,
              sliding_window: int | None = None, scale: float | jax.Array | None = None, return_lse: bool = False,
              implementation: Name = "auto", mesh: Mesh | None = None, batch_axes: Sequence[str] | None = None,
              tensor_axis: str | None = TENSOR) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention (arXiv 1706.03762), softmax in float32.

    Arrays have the order and shapes of `jax.nn.dot_product_attention`. Differentiation is reverse mode only, except
    with a bias or with keys of their own length, segments or positions: these only XLA takes, and forward mode works.

    Args:
      query_BSNH: [B, S, N, H], float32 or bfloat16. B and S may be 0.
      key_BTKH, value_BTKH: [B, T, K, H]; K divides N, and each serves N / K query heads.
      bias: floating, [B, N, S, T], each dim of which may be 1; added to the scaled scores. -inf masks a key.
      segment_ids: int [B, S]; a token attends only to its own segment, and padding (segment 0) gives zeros. None: one
        segment, no padding.
      kv_segment_ids: int [B, T], those of the keys; None: `segment_ids`, where T is S.
      positions: int [B, S], compared by `causal` and `sliding_window` instead of a token's index in its row, for rows
        whose tokens are not in order. Two tokens of one segment with equal positions attend to each other. None is
        faster: the index in the row, which is equivalent to positions that count up from the start of each segment.
      kv_positions: int [B, T], those of the keys; None: `positions`, where T is S.
      causal: a token does not attend to later tokens.
      sliding_window: number of tokens that a token attends to, including itself; needs `causal`.
      scale: factor on the scores; None: H ** -0.5. An array, which may be traced, multiplies the query in its dtype.
      return_lse: also return the log-sum-exp of each query's scores; differentiable.
      implementation: "auto", or one that must run.
      mesh: the batch is sharded over `batch_axes`, heads over `tensor_axis`; a Pallas kernel then runs on each device's
        part.
        None: one device, or inside a shard_map.
      batch_axes: None: those of replica, data and fsdp that the mesh has.

    Returns:
      y [B, S, N, H] in the query's dtype; with `return_lse` (y, lse [B, S, N] float32), lse = log Σ exp(scale · q·k),
      -1e30 for a token that attends to nothing.

    Raises:
      ValueError: shapes, dtypes or mesh axes do not match, or the implementation cannot run here.
    """
    _check(query_BSNH, key_BTKH, value_BTKH, bias=bias, segment_ids=(segment_ids, kv_segment_ids),
           positions=(positions, kv_positions), causal=causal, sliding_window=sliding_window)
    batch, length, heads, head_dim = query_BSNH.shape
    kv_length, kv_heads = key_BTKH.shape[1:3]
    general = kv_length != length or any(x is not None for x in (bias, kv_segment_ids, kv_positions))
    if isinstance(scale, jax.Array):
        query_BSNH, scale = query_BSNH * scale.astype(query_BSNH.dtype), 1.0
    if batch_axes is None:
        batch_axes = find_batch_axes(mesh.axis_names) if mesh is not None else ()
    parts = _parts(mesh, tuple(batch_axes), tensor_axis)
    if heads % parts or kv_heads % parts:
        raise ValueError(f"attention: mesh axis {tensor_axis!r} of {parts} must divide {heads} query heads and"
                         f" {kv_heads} key and value heads")
    request = make_request(
        length=length, heads=heads // parts, kv_heads=kv_heads // parts, head_dim=head_dim, dtype=query_BSNH.dtype.name,
        causal=causal, sliding_window=sliding_window, scale=scale, segments=segment_ids is not None,
        positions=positions is not None, lse=return_lse, mesh=mesh)
    if general and implementation in ("pallas", "cudnn"):
        raise CannotRun(f"attention: implementation={implementation!r} takes no bias, and no keys of their own length,"
                        " segments or positions; what can: xla")
    named, chosen_one = implementation, "xla" if general else chosen(implementation, request=request)
    if batch * length * kv_length == 0:  # no kernel has a grid of no blocks
        y_BSNH, lse_BSN = jnp.zeros_like(query_BSNH), jnp.full((batch, length, heads), NOTHING_SEEN, jnp.float32)
        return (y_BSNH, lse_BSN) if return_lse else y_BSNH
    if named == "auto" and chosen_one == "pallas" and mesh is None and jax.device_count() > 1:
        chosen_one = "xla"  # Only the partitioner knows whether the arrays are sharded, and it cannot split a kernel.
    if general:
        y_BSNH, lse_BSN = attention_general(
            query_BSNH, key_BTKH, value_BTKH, bias_BNST=bias, segment_ids=segment_ids,
            kv_segment_ids=segment_ids if kv_segment_ids is None else kv_segment_ids, positions=positions,
            kv_positions=positions if kv_positions is None else kv_positions, causal=causal,
            sliding_window=sliding_window, scale=request.scale)
        return (y_BSNH, lse_BSN) if return_lse else y_BSNH
    if chosen_one == "xla":
        return attention_xla(query_BSNH, key_BTKH, value_BTKH, segment_ids=segment_ids, positions=positions,
                             causal=causal, sliding_window=sliding_window, scale=request.scale, return_lse=return_lse)
    if chosen_one == "cudnn":
        return jax.nn.dot_product_attention(
            query_BSNH, key_BTKH, value_BTKH, scale=request.scale, is_causal=causal,
            local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
            implementation="cudnn")
    y_BSNH, lse_BNS = fused_attention(
        _pallas_kernels(request.platform), query_BSNH, key_BTKH, value_BTKH, segment_ids=segment_ids,
        positions=positions, request=request, mesh=mesh, batch_axes=tuple(batch_axes), tensor_axis=tensor_axis)
    return (y_BSNH, lse_BNS.swapaxes(1, 2)) if return_lse else y_BSNH


def _check(query_BSNH, key_BTKH, value_BTKH, *, bias, segment_ids, positions, causal, sliding_window) -> None:
    """Raise ValueError if shapes, dtypes or options do not match. Of segments and positions: (of queries, of keys)."""
    arrays = {"query": query_BSNH, "key": key_BTKH, "value": value_BTKH}
    for name, array in arrays.items():
        if array.ndim != 4:
            raise ValueError(f"attention: {name} {array.shape} must have four dims: [batch, sequence, heads, head dim]")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"attention: {name} is {array.dtype.name} and must be float32 or bfloat16")
        if 0 in array.shape[2:]:
            raise ValueError(f"attention: {name} {array.shape} must have at least one head, and its dim be at least 1")
    batch, length, heads, head_dim = query_BSNH.shape
    kv_length, kv_heads = key_BTKH.shape[1:3]
    if key_BTKH.shape != value_BTKH.shape or (key_BTKH.shape[0], key_BTKH.shape[3]) != (batch, head_dim):
        raise ValueError(f"attention: key {key_BTKH.shape} and value {value_BTKH.shape} must both be"
                         f" [{batch}, {kv_length}, K, {head_dim}], as query is {query_BSNH.shape}")
    if heads % kv_heads:
        raise ValueError(f"attention: {kv_heads} key and value heads must divide {heads} query heads")
    for name, (ids, kv_ids) in (("segment_ids", segment_ids), ("positions", positions)):
        for what, given, wanted in ((name, ids, (batch, length)), (f"kv_{name}", kv_ids, (batch, kv_length))):
            if given is not None and given.shape != wanted:
                raise ValueError(f"attention: {what} {given.shape} must be {wanted}")
            if given is not None and not jnp.issubdtype(given.dtype, jnp.integer):
                raise ValueError(f"attention: {what} is {given.dtype.name} and must be integers")
        if (ids is None) != (kv_ids is None) and (ids is None or length != kv_length):
            raise ValueError(f"attention: {name} and kv_{name} belong together where {length} queries meet"
                             f" {kv_length} keys, and one of them is missing")
    if bias is not None and not (jnp.issubdtype(bias.dtype, jnp.floating) and bias.ndim == 4 and all(
            size in (1, whole) for size, whole in zip(bias.shape, (batch, heads, length, kv_length), strict=True))):
        raise ValueError(f"attention: bias {bias.shape} of {bias.dtype.name} must be floating, and"
                         f" {(batch, heads, length, kv_length)} but for dims of 1")
    if positions[0] is not None and not causal:
        raise ValueError("attention: positions need causal=True: nothing else reads them")
    if sliding_window is not None and not causal:
        raise ValueError(f"attention: sliding_window={sliding_window} needs causal=True")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"attention: sliding_window={sliding_window} must be at least 1: a token sees itself")


def _parts(mesh: Mesh | None, batch_axes: tuple[str, ...], tensor_axis: str | None) -> int:
    """Return the number of devices that the heads are sharded over. Raises ValueError if the mesh lacks an axis."""
    if mesh is None:
        return 1
    if missing := [axis for axis in (*batch_axes, tensor_axis) if axis and axis not in mesh.axis_names]:
        raise ValueError(f"attention: the mesh has the axes {', '.join(mesh.axis_names)}, and no {', '.join(missing)}:"
                         " name its own with batch_axes and tensor_axis, and give tensor_axis=None for heads that are"
                         " not split")
    return mesh.shape[tensor_axis] if tensor_axis else 1


def _pallas_module(platform: str):
    if platform == "tpu":
        from ctllm_jax.kernels.attention import tpu

        return tpu
    from ctllm_jax.kernels.attention import hopper

    return hopper


def _pallas_kernels(platform: str) -> Kernels:
    module = _pallas_module(platform)
    return Kernels(module.forward, module.backward)


def _pallas_refusal(platform: str, device_kind: str, request: Request | None) -> str | None:
    if platform != "tpu" and not (platform == "gpu" and is_hopper(device_kind)):
        return "its kernels are for TPU and Hopper GPUs"
    return None if request is None else _pallas_module(platform).refusal(request)


def _fastest_on_gpu(request: Request | None) -> bool:
    return request is not None and _pallas_module("gpu").is_fastest(request)


def _cudnn_refusal(platform: str, request: Request | None) -> str | None:
    if platform != "gpu":
        return "it is for NVIDIA GPUs"
    if jax.default_backend() != "gpu":
        return "it is looked for while a function is traced, and there is no GPU here"
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.cudnn") is None:
        return "the cuDNN wheel is not installed (pip extra cuda12 or cuda13)"
    if request is None:
        return None
    if request.segments:
        return "its public interface takes no segment ids, and a mask would be dense"
    if request.positions:
        return "it compares places in the row, and no positions"
    if request.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 and float16, and the query is {request.dtype}"
    if request.lse:
        return "its log-sum-exp has no gradient"
    if request.head_dim > 128 or request.head_dim % 8:
        return f"head dim {request.head_dim} is not a multiple of 8 up to 128"
    return None
