"""The interface of a hand-written attention kernel, and the differentiable function made from it.

An implementation is a module with three functions, `refusal`, `forward` and `backward`, which `Kernels` describes. They
do not handle gradients, meshes or remat. This module joins the two passes, names the residuals for a remat policy, and
on a mesh runs the kernels on each device's rows and heads (a Pallas call is not partitioned automatically).

Legend: B batch, S sequence, N query heads, K key and value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

NOTHING_SEEN = -1e30
"""Log-sum-exp of a query that attends to no key: finite, so that the difference of two of them is not NaN."""


class Request(NamedTuple):
    """The static arguments of a call, sent to an implementation; hashable.

    Attributes:
      length, heads, kv_heads, head_dim: S, N, K, H, of one device's part on a mesh.
      dtype: of query, key and value, by name.
      causal, sliding_window, scale: as for `kernels.attention`; the scale is a number.
      segments, positions: whether they are given.
      platform: "cpu", "gpu" or "tpu", the platform that it will run on (which may be absent, for ahead-of-time
        compilation).
      device_kind: the value of `jax.Device.device_kind`.
      lse: whether the log-sum-exp is requested.
    """

    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    causal: bool
    sliding_window: int | None
    scale: float
    segments: bool
    positions: bool
    platform: str
    device_kind: str
    lse: bool = False


class Kernels(NamedTuple):
    """The two passes of one implementation.

    Attributes:
      forward: `(request, query_BSNH, key_BSKH, value_BSKH, segment_ids_BS, positions_BS) -> (y_BSNH, lse_BNS)`. `y` has
        the query's dtype; `lse` is float32, log Σ exp(scale · q·k) over the visible keys of a query, natural logarithm.
        A query without visible keys (segment 0) gives y = 0 and lse = NOTHING_SEEN. `segment_ids` (int32) and
        `positions` (int32) are None if not given.
      backward: `(request, query_BSNH, key_BSKH, value_BSKH, segment_ids_BS, positions_BS, cotangent_BSNH, lse_BNS,
        delta_BNS) -> (query_grad_BSNH, key_grad_BSKH, value_grad_BSKH)`, in the dtypes of query, key and value. With
        p = exp(scale · q·k - lse) for visible keys, else 0, and dp = cotangent · v, the gradient of a score is p (dp -
        delta). `delta` (float32) is Σ y · cotangent minus the cotangent of lse. Queries of segment 0 have a zero
        cotangent, and their gradients are zero.
    """

    forward: Callable
    backward: Callable


class _Setting(NamedTuple):
    request: Request
    kernels: Kernels
    mesh: Mesh | None
    batch_axes: tuple[str, ...]
    tensor_axis: str | None


def fused_attention(kernels: Kernels, query_BSNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array, *,
                    segment_ids: jax.Array | None, positions: jax.Array | None, request: Request,
                    mesh: Mesh | None = None, batch_axes: tuple[str, ...] = (), tensor_axis: str | None = None
                    ) -> tuple[jax.Array, jax.Array]:
    """Return (y_BSNH, lse_BNS) of `kernels`; both are differentiable in query, key and value, in reverse mode only."""
    setting = _Setting(request, kernels, None if mesh is None or mesh.size == 1 else mesh, batch_axes, tensor_axis)
    return _attend(setting, query_BSNH, key_BSKH, value_BSKH, segment_ids, positions)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(setting, query_BSNH, key_BSKH, value_BSKH, segment_ids_BS, positions_BS):
    return _forward(setting, query_BSNH, key_BSKH, value_BSKH, segment_ids_BS, positions_BS)[0]


def _forward(setting, *inputs):
    y_BSNH, lse_BNS = _on_mesh(setting, setting.kernels.forward, inputs, out="yl")
    # Named for a remat policy, which can then save everything that the backward pass reads besides query, key and
    # value.
    y_BSNH = checkpoint_name(y_BSNH, "attention_output")
    lse_BNS = checkpoint_name(lse_BNS, "attention_log_sums")
    return (y_BSNH, lse_BNS), (*inputs, y_BSNH, lse_BNS)


def _backward(setting, residuals, cotangents):
    query_BSNH, key_BSKH, value_BSKH, segment_ids_BS, positions_BS, y_BSNH, lse_BNS = residuals
    cotangent_BSNH, lse_cotangent_BNS = cotangents
    if segment_ids_BS is not None:
        cotangent_BSNH = jnp.where((segment_ids_BS > 0)[:, :, None, None], cotangent_BSNH, 0)
    delta_BNS = jnp.einsum("BSNH,BSNH->BNS", y_BSNH.astype(jnp.float32), cotangent_BSNH.astype(jnp.float32))
    inputs = (query_BSNH, key_BSKH, value_BSKH, segment_ids_BS, positions_BS, cotangent_BSNH, lse_BNS,
              delta_BNS - lse_cotangent_BNS)
    return (*_on_mesh(setting, setting.kernels.backward, inputs, out="yyy"), None, None)


_attend.defvjp(_forward, _backward)


def _on_mesh(setting: _Setting, function: Callable, inputs: tuple, *, out: str):
    """`function(request, *inputs)`, on each device's rows and heads; `out`: y for [B, S, heads, H], l for [B, N, S]."""
    function = partial(function, setting.request)
    if setting.mesh is None:
        return function(*inputs)
    batch, heads = setting.batch_axes or None, setting.tensor_axis
    specs = {"y": PartitionSpec(batch, None, heads), "l": PartitionSpec(batch, heads), "s": PartitionSpec(batch)}
    kinds = "yyyss" + "yll"[:len(inputs) - 5]
    # check_vma can be off because nothing is differentiated through this shard_map, and no value is summed in it.
    return jax.shard_map(function, mesh=setting.mesh, check_vma=False, in_specs=tuple(specs[kind] for kind in kinds),
                         out_specs=tuple(specs[kind] for kind in out))(*inputs)
