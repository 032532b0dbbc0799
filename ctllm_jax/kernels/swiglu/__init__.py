"""SwiGLU's gate, up and activation (arXiv 2002.05202)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ctllm_jax.kernels.dispatch import Name, choose
from ctllm_jax.kernels.hopper import is_hopper
from ctllm_jax.kernels.swiglu.blocks import CHIPS, find_chip
from ctllm_jax.kernels.swiglu.measured import MEASURED
from ctllm_jax.kernels.swiglu.mesh import over_mesh
from ctllm_jax.kernels.swiglu.tpu import DTYPES, swiglu_tpu
from ctllm_jax.kernels.swiglu.xla import activate, swiglu_xla

__all__ = ["activate", "chosen", "shape_class", "sharded_swiglu", "swiglu"]


def chosen(implementation: Name = "auto", *, device: jax.Device | None = None, dtype: str = "bfloat16",
           shape: tuple[int, int, int] | None = None, recompute: bool = True) -> str:
    """Return the implementation that `swiglu` uses.

    Args:
      implementation: "auto", or a name. "auto" chooses Pallas where it was measured to be faster than XLA.
      device: where it will run; None: the default device.
      dtype: of the inputs.
      shape: tokens, D and F on one device. None: "auto" chooses as for unmeasured shapes.
      recompute: as for `swiglu`.

    Raises:
      ValueError: the named implementation cannot run there.
    """
    device = device or jax.local_devices()[0]
    kind = device.device_kind
    chip, reason = find_chip(kind), None
    if is_hopper(kind):
        from ctllm_jax.kernels.swiglu import hopper

        reason = hopper.refusal(kind, dtype=dtype, hidden=shape[1] if shape else 64, ffn=shape[2] if shape else 64)
    elif chip is None:
        names = ", ".join(sorted({chip.name for chip in CHIPS.values()}))
        reason = f"its kernels are for TPU {names} and Hopper GPUs, and this is a {kind}"
    elif dtype not in DTYPES:
        reason = f"its kernels take {' and '.join(DTYPES)}, and this is {dtype}"
    name = choose("swiglu", implementation, reasons={"xla": None, "pallas": reason},
                  platform="gpu" if device.platform in ("cuda", "rocm") else device.platform)
    if implementation == "auto" and reason is None and shape is not None:
        faster = MEASURED.get((chip.name if chip else "hopper", dtype, shape_class(*shape), recompute), 0) > 1
        return "pallas" if faster else name
    return name


def shape_class(tokens: int, hidden: int, ffn: int) -> str:
    """The class of shapes that one measurement represents: each size lies between the same two powers of two."""
    return " ".join(f"{letter}{1 << size.bit_length() - 1 if size else 0}"
                    for letter, size in (("t", tokens), ("d", hidden), ("f", ffn)))


def swiglu(x: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, *, implementation: Name = "auto",
           recompute: bool = True) -> jax.Array:
    """silu(x · gate) ⊙ (x · up), the activation in float32. Differentiation is reverse mode only.

    Args:
      x: [..., D], float32 or bfloat16; any of its dims may be 0.
      gate_DF, up_DF: [D, F], x's dtype.
      implementation: "auto", or one that must run. Pallas needs arrays on one device, or a `shard_map` around the call;
        use `sharded_swiglu` on a mesh. "auto" chooses it only in a process with one device.
      recompute: for Pallas: save only x and the weights, and recompute both products in the backward pass. False saves
        the products, as XLA does; use it inside a `jax.checkpoint`, which recomputes them anyway.

    Returns:
      [..., F] in x's dtype.

    Raises:
      ValueError: shapes or dtypes do not match, or the implementation cannot run here.
    """
    _check(x, gate_DF, up_DF)
    if implementation == "auto" and jax.device_count() > 1:
        implementation = "xla"  # The arrays may be sharded, and the partitioner cannot split a kernel.
    return _run(x, gate_DF, up_DF, device=jax.local_devices()[0], recompute=recompute,
                name=_choose_for(x, gate_DF, up_DF, implementation, device=None, recompute=recompute))


def sharded_swiglu(x: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, *, mesh: Mesh, batch_axes: tuple[str, ...],
                   weight_axis: str, tensor_axis: str, implementation: Name = "auto",
                   recompute: bool = True, project: Callable | None = None) -> jax.Array:
    """`swiglu` for arrays on a mesh: B over `batch_axes`, D of the weights over `weight_axis`, F over `tensor_axis`.

    XLA's implementation is partitioned by XLA or by `project`; the others run in a `shard_map`, with D gathered. Call
    it under `jax.jit`.

    Args:
      x: [B, ..., D]; B is a multiple of the devices along `batch_axes`.
      mesh: the devices that it is compiled for, which may be absent.
      project: `(x, gate, up) -> (x · gate, x · up)` for XLA's implementation; None: two dots.

    Raises:
      ValueError: as for `swiglu`; or the mesh lacks an axis or does not divide a size.
    """
    _check(x, gate_DF, up_DF)
    if missing := [axis for axis in (*batch_axes, weight_axis, tensor_axis) if axis not in mesh.axis_names]:
        raise ValueError(f"swiglu: the mesh has the axes {', '.join(mesh.axis_names)}, and no {', '.join(missing)}")
    rows, columns = math.prod(mesh.shape[axis] for axis in batch_axes), mesh.shape[tensor_axis]
    device = mesh.devices.flat[0]
    name = _choose_for(x, gate_DF, up_DF, implementation, device=device, recompute=recompute, split=(rows, columns))
    function = partial(_run, device=device, recompute=recompute, name=name)
    if name == "xla" and project is not None and mesh.size > 1:
        return activate(*project(x, gate_DF, up_DF))
    if name == "xla" or mesh.size == 1:
        return function(x, gate_DF, up_DF)
    depth = mesh.shape[weight_axis]
    if x.ndim < 2 or x.shape[0] % rows or gate_DF.shape[0] % depth or gate_DF.shape[1] % columns:
        raise ValueError(f"swiglu: x {x.shape} and weights {gate_DF.shape} on a mesh: the first dim of x must be a"
                         f" multiple of {rows} ({', '.join(batch_axes)}), D of {depth} ({weight_axis}) and F of"
                         f" {columns} ({tensor_axis})")
    return over_mesh(function, x, gate_DF, up_DF, mesh=mesh, batch_axes=batch_axes, weight_axis=weight_axis,
                     tensor_axis=tensor_axis)


def _check(x: jax.Array, gate_DF: jax.Array, up_DF: jax.Array) -> None:
    for name, array in (("x", x), ("gate", gate_DF), ("up", up_DF)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"swiglu: {name} is {array.dtype.name} and must be float32 or bfloat16")
    if x.ndim < 1:
        raise ValueError("swiglu: x must have at least one dim: [..., D]")
    hidden = x.shape[-1]
    if gate_DF.ndim != 2 or gate_DF.shape != up_DF.shape or gate_DF.shape[0] != hidden:
        raise ValueError(f"swiglu: gate {gate_DF.shape} and up {up_DF.shape} must both be [{hidden}, F],"
                         f" as x is {x.shape}")


def _choose_for(x: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, implementation: Name, *, device: jax.Device | None,
                recompute: bool, split: tuple[int, int] = (1, 1)) -> str:
    """`chosen` for these arrays, where each device holds one of `split` parts of the tokens and of F."""
    dtypes = sorted({str(array.dtype) for array in (x, gate_DF, up_DF)})
    shape = (math.prod(x.shape[:-1]) // split[0], x.shape[-1], gate_DF.shape[1] // split[1])
    return chosen(implementation, device=device, dtype=" with ".join(dtypes), shape=shape, recompute=recompute)


def _run(x: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, *, name: str, device: jax.Device,
         recompute: bool) -> jax.Array:
    if not x.size or not gate_DF.size:  # no kernel has a grid of no blocks
        name = "xla"
    if name == "pallas" and is_hopper(device.device_kind):
        from ctllm_jax.kernels.swiglu.hopper import swiglu_hopper

        return swiglu_hopper(x, gate_DF, up_DF, recompute=recompute, multiprocessors=device.core_count)
    if name == "pallas" and (chip := find_chip(device.device_kind)):
        return swiglu_tpu(x, gate_DF, up_DF, chip=chip, recompute=recompute)
    return swiglu_xla(x, gate_DF, up_DF)
