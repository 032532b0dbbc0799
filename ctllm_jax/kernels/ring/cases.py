"""The ring's cases for `launch.py kernels`: the scattered sum of a gradient over all devices, as `gathered` computes
it.

`pallas` uses remote copies, `xla` permutes. On a slice of several hosts, only the devices of one host take part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctllm_jax.config.axes import FSDP as AXIS
from ctllm_jax.gathered import Rings, find_rings, scatter_sum
from ctllm_jax.kernels.dispatch import CannotRun
from ctllm_jax.kernels.registry import Bench, Check, Compile
from ctllm_jax.kernels.topology import find_topology

TOLERANCES = {"float32": 1e-5, "bfloat16": 0.1}
"""Largest error after SUMS, relative to the largest number."""
SUMS = 20


def checks() -> Iterator[Check]:
    """Number of consecutive sums, so that devices that are ahead meet devices that lag."""
    for dtype in TOLERANCES:
        yield Check("ring", f"{SUMS} sums, {dtype}", partial(_compare, dtype))


def benches(*, lengths: list[int], rows: int, hidden: int, ffn: int, dtype: str, **_: Any) -> Iterator[Bench]:
    """The gradient of one weight of the FFN: its matmul, overlapped with its sum."""
    for length in lengths:
        sizes = {"tokens": rows * length, "hidden": hidden, "ffn": ffn, "dtype": dtype}
        yield Bench("ring", f"T {rows * length}, gradient of {hidden} x {ffn}", 2.0 * rows * length * hidden * ffn,
                    ("pallas", "xla"),
                    partial(_prepare, tokens=rows * length, hidden=hidden, ffn=ffn, dtype=dtype), sizes)


def compiles(*, chips: list[str]) -> Iterator[Compile]:
    """Compile remote copies for the smallest slice that is a torus."""
    for name in chips:
        mesh = make_mesh(find_topology(name, megacore=True))
        for dtype in TOLERANCES if find_rings(mesh, AXIS, "remote_copies") else ():
            yield Compile(name, "ring", f"sum of 2048 x 512, {dtype}", 0, partial(_lower, mesh, dtype))


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """All devices along one axis, with neighbors of the torus adjacent; a square of four as one ring.

    As two rings of two, each device would have only one neighbor, so signals of different neighbors could not be
    confused.
    """
    if len(devices) == 4 and all(hasattr(device, "coords") for device in devices):
        first, second, third, fourth = sorted(devices, key=lambda device: device.coords)
        mesh = Mesh(np.array([first, second, fourth, third]), (AXIS,))
        if len(find_rings(mesh, AXIS, "remote_copies").sizes) == 1:
            return mesh
    return jax.make_mesh((len(devices),), (AXIS,), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))


def make_sums(mesh: Mesh, implementation: str, *, times: int) -> Any:
    """`x [devices · devices · R, C] -> [devices · R, C]`, both sharded over the devices: the scattered sum of all
    devices' x.

    Each further sum uses the previous result of each device, times the weights of `_mixed`. Raises CannotRun without a
    torus.
    """
    rings = _find(mesh, implementation)

    def local(x):
        weights = jnp.roll(jnp.asarray(_mixed(mesh.size), x.dtype), -jax.lax.axis_index(AXIS))
        part = None
        for _ in range(times):
            x = x if part is None else (weights[:, None, None] * part[None]).reshape(x.shape)

            def block(start, size, half, x=x):
                return jax.lax.dynamic_slice_in_dim(x, start, size, 0)[:, half]

            part = scatter_sum(block, size=x.shape[0], other=x.shape[1], axis=AXIS, dim=0, rings=rings)
        return part

    return _split(local, mesh)


def _find(mesh: Mesh, implementation: str) -> Rings:
    rings = find_rings(mesh, AXIS, "remote_copies")
    if not rings or implementation == "cudnn":
        raise CannotRun(f"ring: implementation={implementation!r} cannot run here: it needs TPU chips in a torus")
    return rings._replace(remote=implementation == "pallas")


def _mixed(count: int) -> np.ndarray:
    """Weights whose circulant matrix is orthogonal, so that repeated sums keep their magnitude and each device's share
    stays distinguishable."""
    return np.full(count, 2 / count) - np.eye(count)[0]


def _split(function: Any, mesh: Mesh) -> Any:
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec(AXIS), out_specs=PartitionSpec(AXIS),
                                 check_vma=False))


def _compare(dtype: str, implementation: str) -> dict[str, tuple[float, float]]:
    mesh = make_mesh(jax.local_devices())
    count, sums = mesh.size, make_sums(mesh, implementation, times=SUMS)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((count, count, 16 * 256), np.float32), dtype)
    given = jax.device_put(x.reshape(-1, 256), NamedSharding(mesh, PartitionSpec(AXIS)))
    found = np.asarray(sums(given).astype(jnp.float32), np.float64).reshape(count, -1)
    exact = np.asarray(x.astype(jnp.float32), np.float64).sum(0)
    places = np.arange(count)
    matrix = _mixed(count)[(places[:, None] + places) % count]
    for _ in range(SUMS - 1):
        exact = matrix @ exact
    apart = np.abs(found - exact) / np.abs(exact).max()
    # Not `max`, which would ignore a NaN.
    return {"sum": (float(np.sort(apart, axis=None)[-1]), TOLERANCES[dtype])}


def _prepare(implementation: str, *, tokens: int, hidden: int, ffn: int, dtype: str) -> tuple[Any, tuple]:
    mesh = make_mesh(jax.local_devices())
    rings = _find(mesh, implementation)

    def local(x_TI, dy_TO):
        def block(start, size, half):
            rows_TI = jax.lax.dynamic_slice_in_dim(x_TI, start, size, 1)
            return jax.lax.dot_general(rows_TI, dy_TO[:, half], (((0,), (0,)), ((), ())))

        return scatter_sum(block, size=hidden, other=ffn, axis=AXIS, dim=0, rings=rings)

    random = np.random.default_rng(0)
    arrays = tuple(jax.device_put(jnp.asarray(random.standard_normal((mesh.size * tokens, width), np.float32), dtype),
                                  NamedSharding(mesh, PartitionSpec(AXIS))) for width in (hidden, ffn))
    return _split(local, mesh), arrays


def _lower(mesh: Mesh, dtype: str) -> Any:
    shape = jax.ShapeDtypeStruct((mesh.size * 2048, 512), dtype, sharding=NamedSharding(mesh, PartitionSpec(AXIS)))
    return make_sums(mesh, "pallas", times=2).lower(shape)
