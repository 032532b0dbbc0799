"""The mesh, and one table from the logical names of dims to mesh axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ctllm_jax import kernels
from ctllm_jax.config.axes import AXES, BATCH_AXES, COPIES, FSDP, REPLICA, TENSOR
from ctllm_jax.config.errors import UserError
from ctllm_jax.gathered import RingsName, find_rings, gathered_matmul
from ctllm_jax.kernels.dispatch import Name

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "vocab": TENSOR,
    "embed": FSDP,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "ffn": TENSOR,
    "layers": None,
    "head_dim": None,
    "rank": None,
    "norm": None,
    None: None,
}
"""Logical dim -> mesh axis (or axes, or None for a dim that every device holds whole)."""


def make_mesh(sizes: dict[str, int | None], devices: Sequence[jax.Device] | None = None, *,
              nodes: int | None = None) -> Mesh:
    """Make a mesh over all devices.

    Args:
      sizes: number of devices along each of AXES, 1 if absent. One may be -1 (all remaining devices), and `replica` may
        be None (the number of slices or nodes).
      devices: default `jax.devices()`, of all processes.
      nodes: number of slices or nodes, for devices that do not state it, such as those that are only compiled for.

    Raises:
      UserError: the product of the sizes is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    replicas = nodes or (1 if devices[0].platform == "cpu" else slices)
    asked = {axis: replicas if (size := sizes.get(axis, 1)) is None else size for axis in AXES}
    given = math.prod(size for size in asked.values() if size != -1)
    shape = tuple(len(devices) // given if size == -1 else size for size in asked.values())
    if math.prod(shape) != len(devices):
        wanted = describe_mesh(asked)
        raise UserError(f"mesh {wanted} does not cover {len(devices)} devices exactly:"
                         f" the product must be {len(devices)}, or one axis -1 and the others divide it")
    if devices[0].platform == "cpu":
        grid = np.asarray(devices).reshape(shape)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    if slices > 1:
        return _hybrid_mesh(shape, devices, slices)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def describe_mesh(sizes: Mapping[str, int]) -> str:
    """`data 1 x fsdp 8 x tensor 1`; `replica` only where there are several."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if axis != REPLICA or size != 1)


def _hybrid_mesh(shape: tuple[int, ...], devices: Sequence[jax.Device], slices: int) -> Mesh:
    """Make a mesh over several slices or GPU nodes; the slower network between them lies along one axis."""
    from jax.experimental import mesh_utils

    # Copies of the model communicate least, sharded parameters more; heads and FFN of one matmul stay together.
    axis = next((index for index, size in enumerate(shape[:3]) if size % slices == 0), None)
    if axis is None:
        sizes = describe_mesh(dict(zip(AXES, shape, strict=True)))
        raise UserError(f"mesh {sizes} over {slices} slices or nodes: mesh.replica, mesh.data or mesh.fsdp must be a"
                        f" multiple of {slices}, since the network between them lies along one of the three")
    between = tuple(slices if index == axis else 1 for index in range(len(shape)))
    within = tuple(size // outer for size, outer in zip(shape, between, strict=True))
    grid = mesh_utils.create_hybrid_device_mesh(within, between, devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition_spec(dims: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of an array's dims.

    Raises:
      ValueError: an unknown dim, or two dims that use the same axis.
    """
    entries, used = [], []
    for dim in dims:
        if dim not in RULES:
            raise ValueError(f"dim {dim!r} of {tuple(dims)} is not in the sharding rules: {', '.join(map(str, RULES))}")
        axes = RULES[dim]
        used += [axes] if isinstance(axes, str) else list(axes or ())
        entries.append(axes)
    if len(set(used)) < len(used):
        raise ValueError(f"dims {tuple(dims)} use one mesh axis twice: {used}")
    return PartitionSpec(*entries)


def param_shardings(table: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The sharding of every parameter of a table from `model.parameters`.

    Raises:
      UserError: a dim that its mesh axes do not divide, with the parameter and the numbers.
    """
    def shard(entry: Any, path: str) -> Any:
        if isinstance(entry, dict):
            return {name: shard(inner, f"{path}/{name}" if path else name) for name, inner in entry.items()}
        spec = partition_spec(entry.dims)
        for dim, size, axes in zip(entry.dims, entry.shape, spec, strict=True):
            parts = axis_size(mesh, axes)
            if size % parts:
                raise UserError(f"parameter {path}: its {dim} of {size} cannot be split over mesh axis {axes}"
                                 f" of {parts}")
        return NamedSharding(mesh, spec)
    return shard(table, "")


def axis_size(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Number of devices along one mesh axis, or along several."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's arrays [B, S]: rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that every device holds as a whole."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """Row indices of a global batch [rows, …] that this process's devices hold, ascending."""
    held: set[int] = set()
    for index in batch_sharding(mesh).addressable_devices_indices_map((rows,)).values():
        if index is not None:
            held.update(range(*index[0].indices(rows)))
    return sorted(held)


def embed_tokens(embedding_VD: jax.Array, tokens_BS: jax.Array, *, mesh: Mesh, dtype: Any) -> jax.Array:
    """Look up an embedding that is sharded over tensor (vocabulary) and fsdp (width), for a batch sharded over
    BATCH_AXES.

    The partitioner would gather the whole table, or all activations. Here each device looks up the tokens of its fsdp
    group in its own part, and one all-to-all exchanges widths for rows; the gradient takes the reverse path.

    Returns [B, S, D] in `dtype`.
    """
    def lookup(part_VD: jax.Array, tokens_BS: jax.Array) -> jax.Array:
        tokens_BS = jax.lax.all_gather(tokens_BS, FSDP, axis=0, tiled=True)
        rows_BS = tokens_BS - jax.lax.axis_index(TENSOR) * part_VD.shape[0]
        mine_BS = (rows_BS >= 0) & (rows_BS < part_VD.shape[0])
        x_BSD = jnp.take(part_VD, jnp.where(mine_BS, rows_BS, 0), axis=0).astype(dtype)
        x_BSD = jax.lax.psum(jnp.where(mine_BS[:, :, None], x_BSD, 0), TENSOR)
        return jax.lax.all_to_all(x_BSD, FSDP, split_axis=0, concat_axis=2, tiled=True)

    return jax.shard_map(lookup, mesh=mesh, in_specs=(PartitionSpec(TENSOR, FSDP), PartitionSpec(BATCH_AXES)),
                         out_specs=PartitionSpec(BATCH_AXES))(embedding_VD, tokens_BS)


def project(x: jax.Array, weights: Sequence[jax.Array], dims: Sequence[tuple[str | None, ...]], *,
            mesh: Mesh, keep: bool = False, rings: RingsName = "auto") -> list[jax.Array]:
    """Compute x·W for each W as `model.decoder.project` does, for weights that are sharded over the mesh by RULES.

    Each device gathers a weight along fsdp and receives its part of the gradient's sum; only that part is then summed
    over copies of the model. `keep` is as for `gathered_matmul`, `rings` as from `find_rings`.
    """
    inputs = x.ndim - 2
    specs = [partition_spec(each) for each in dims]
    found_rings = find_rings(mesh, FSDP, rings)

    def outside(spec: PartitionSpec) -> list:
        return [None if axis == FSDP else axis for axis in spec]

    def local(x: jax.Array, *parts: jax.Array) -> list[jax.Array]:
        found = []
        for part, spec in zip(parts, specs, strict=True):
            split = tuple(spec).index(FSDP) >= inputs  # in the outputs
            shape = part.shape[inputs:-1] + (-1,) if split else part.shape[inputs:]
            part = jax.lax.pcast(part.reshape(math.prod(part.shape[:inputs]), -1), COPIES, to="varying")
            # Cast here, so that the gradients of all weights are summed over tensor in one reduction.
            x_TI = x.reshape(-1, part.shape[0] if split else x.shape[-1])
            if TENSOR not in spec[:inputs]:
                x_TI = jax.lax.pcast(x_TI, TENSOR, to="varying")
            y = gathered_matmul(x_TI, part, axis=FSDP, dim=int(split), rings=found_rings, keep=keep)
            y = y.reshape(*x.shape[:2], *shape)
            found.append(jax.lax.psum(y, TENSOR) if TENSOR in spec[:inputs] else y)
        return found

    return jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(BATCH_AXES, None, *outside(specs[0])[:inputs]), *specs),
        out_specs=[PartitionSpec(BATCH_AXES, None, *outside(spec)[inputs:]) for spec in specs])(x, *weights)


# Equal arguments give the same function object, so that a decoder made again reuses compiled programs.
@functools.cache
def attention_on(mesh: Mesh | None, *, implementation: Name) -> Callable[..., jax.Array]:
    """Return attention for a decoder on this mesh; None: without a mesh, for arrays on any devices."""
    if mesh is None:
        # As with SwiGLU below.
        return partial(kernels.attention, implementation=implementation if jax.device_count() == 1 else "xla")
    return partial(kernels.attention, mesh=mesh, implementation=implementation)


@functools.cache
def swiglu_on(mesh: Mesh | None, *, implementation: Name, recompute: bool, rings: RingsName = "auto"
              ) -> Callable[..., jax.Array]:
    """`(x_BSD, gate_DF, up_DF) -> [B, S, F]` for a decoder on this mesh; None: without a mesh, for arrays on any
    devices.

    Args:
      implementation: as of `kernels.swiglu`.
      recompute: as of `kernels.swiglu`; False if remat already recomputes the FFN, so that it does not happen twice.
      rings: as of `project`.
    """
    if mesh is None:
        # Arrays that several devices may hold are handled by the partitioner, which cannot split a kernel.
        return partial(kernels.swiglu, recompute=recompute,
                       implementation=implementation if jax.device_count() == 1 else "xla")
    def both(x_BSD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array) -> list[jax.Array]:
        return project(x_BSD, [gate_DF, up_DF], [("embed", "ffn")] * 2, mesh=mesh, keep=not recompute, rings=rings)

    return partial(kernels.sharded_swiglu, mesh=mesh, batch_axes=BATCH_AXES, weight_axis=FSDP, tensor_axis=TENSOR,
                   implementation=implementation, recompute=recompute, project=both)
