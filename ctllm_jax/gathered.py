"""Matmuls with sharded weights: weights are gathered before, and gradients summed and scattered after the matmul.

By default, XLA's partitioner gathers some weights by all-reduces, and TPU's compiler sums a gradient over a whole slice
by a synchronous all-reduce of the full array. Here the gradient travels around the rings of the torus block by block,
while the matmul computes the next block (Wang et al., ASPLOS 2023, "Overlap communication with dependent computation
via decomposition"). All of this runs inside a `shard_map`.

A step around a ring is an XLA permute or one of our remote copies (`ring_copies`).

Legend: T tokens of a device, I inputs, O outputs of a weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, TypeVar, TypeVarTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

Index = TypeVar("Index", jax.Array, int)
Trees = TypeVarTuple("Trees")


def vary_together(*trees: *Trees) -> tuple[*Trees]:
    """The trees, each array varying over every mesh axis over which one of them varies.

    That is what a `jax.shard_map` with `check_vma=True` asks of the carry of a loop, whose start is a constant, and of
    the arguments of a `custom_vjp`, whose gradients then get the sums over the axes that an argument was equal along.
    Elsewhere nothing varies, and this returns the trees as they are.
    """
    axes = frozenset[str]().union(*map(_varying_axes, jax.tree.leaves(trees)))

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, trees)


def _varying_axes(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


RingsName = Literal["auto", "off", "remote_copies"]


class Rings(NamedTuple):
    """How sums travel around a torus. False if they do not: there is no torus, or XLA's reduction is as fast.

    Attributes:
      sizes: lengths of the directions of the torus that a mesh axis runs along, slowest first.
      remote: steps use remote copies, else permutes.
      gathers: weights are also gathered ring by ring, else all at once.
    """

    sizes: tuple[int, ...] = ()
    remote: bool = False
    gathers: bool = False

    def __bool__(self) -> bool:
        return bool(self.sizes)


def find_rings(mesh: Mesh, axis: str, how: RingsName = "auto") -> Rings:
    """The rings of a mesh axis of TPUs.

    Args:
      how: "auto": rings with permutes, but no rings on v5e of more than 16 chips, where permutes are synchronous
        (libtpu 0.0.42) and no faster than one reduction over both directions of the network. "off": no rings.
        "remote_copies": rings with remote copies on every torus.
    """
    if how == "off":
        return Rings()
    flat = mesh.devices.flat[0].device_kind == "TPU v5 lite" and mesh.size > 16
    if flat and how == "auto":
        return Rings()
    # XLA gathers over a whole torus by all-reduces, which transfer twice the bytes; on v5e a flag prevents this.
    return Rings(_directions(mesh, axis), remote=how == "remote_copies", gathers=not flat)


def _directions(mesh: Mesh, axis: str) -> tuple[int, ...]:
    """Lengths of the torus directions that a mesh axis of TPUs runs along, slowest first; () if there are none."""
    place = mesh.axis_names.index(axis)
    devices = np.moveaxis(mesh.devices, place, 0).reshape(mesh.shape[axis], -1)[:, 0]
    if devices[0].platform != "tpu" or len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        return ()
    coordinates = np.array([(*device.coords, device.core_on_chip) for device in devices])
    if np.abs(coordinates - np.roll(coordinates, 1, 0)).sum(1).max() == 1:  # neighbors, the last and the first too
        return (len(devices),) if len(devices) > 2 else ()
    directions = [(len(set(column)), column) for column in coordinates.T if len(set(column)) > 1]
    for order in itertools.permutations(directions):
        sizes = tuple(size for size, _ in order)
        if math.prod(sizes) != len(devices):
            continue
        grids = [column.reshape(sizes) for _, column in order]
        if all((grid == np.moveaxis(grid, place, 0)[:, *[0] * (len(sizes) - 1)].reshape(
                [-1 if each == place else 1 for each in range(len(sizes))])).all() for place, grid in enumerate(grids)):
            return sizes
    return ()


def gathered_matmul(x_TI: jax.Array, part: jax.Array, *, axis: str, dim: int, rings: Rings,
                    keep: bool) -> jax.Array:
    """Return x · W, [T, O] in x's dtype, where each device along `axis` holds a part of W [I, O] in dim 0 or 1.

    Args:
      rings: from `find_rings`; empty: the gradient uses one reduce-scatter.
      keep: save the gathered weight for the backward pass. Use True inside a `jax.checkpoint`, which gathers it again
        anyway. False gathers it again in the backward pass, because the gathered weights of all layers would be the
        whole model.
    """
    return _matmul(x_TI, part, (axis, dim, rings, keep))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x_TI, part, setting):
    axis, dim, rings, _ = setting
    return jnp.dot(x_TI, gather(part, axis, dim=dim, rings=rings))


def _forward(x_TI, part, setting):
    axis, dim, rings, keep = setting
    weight_IO = gather(part, axis, dim=dim, rings=rings)
    return jnp.dot(x_TI, weight_IO), (x_TI, weight_IO if keep else part)


def _backward(setting, residuals, dy_TO):
    axis, dim, rings, keep = setting
    x_TI, weight_IO = residuals
    if not keep:
        weight_IO = gather(weight_IO, axis, dim=dim, rings=rings)
    first = (((0,), (0,)), ((), ()))

    def block(start: jax.Array | int, size: int, half: slice) -> jax.Array:
        """Select the rows or columns of this device's own sum, and one half of the other dim."""
        along = jax.lax.dynamic_slice_in_dim(x_TI if dim == 0 else dy_TO, start, size, 1)
        left, right = (along, dy_TO[:, half]) if dim == 0 else (x_TI[:, half], along)
        return jax.lax.dot_general(left, right, first)

    if rings:
        grad = scatter_sum(block, size=weight_IO.shape[dim], other=weight_IO.shape[1 - dim], axis=axis, dim=dim,
                           rings=rings)
    else:
        grad = jax.lax.psum_scatter(jax.lax.dot_general(x_TI, dy_TO, first), axis, scatter_dimension=dim, tiled=True)
    return jnp.dot(dy_TO, weight_IO.T), grad


_matmul.defvjp(_forward, _backward)


def gather(part: jax.Array, axis: str, *, dim: int, rings: Rings) -> jax.Array:
    """Gather all parts along `axis` in order, at once or ring by ring."""
    if len(rings.sizes) < 2 or not rings.gathers:
        return jax.lax.all_gather(part, axis, axis=dim, tiled=True)
    left, devices = 1, math.prod(rings.sizes)
    for ring in reversed(rings.sizes):
        firsts = [index for index in range(devices) if index // left % ring == 0]
        groups = [[first + step * left for step in range(ring)] for first in firsts]
        part = jax.lax.all_gather(part, axis, axis=dim, tiled=True, axis_index_groups=groups)
        left *= ring
    return part


def scatter_sum(block: Callable, *, size: int, other: int, axis: str, dim: int, rings: Rings) -> jax.Array:
    """This device's part, along `dim`, of the sum over `axis` of an array [size, other] (or [other, size]).

    Args:
      block: `(start, size, half) -> block` of this device's own array: `size` along `dim` from `start`, `half` of the
        other dim. It is computed while earlier blocks are in transit.
    """
    if not rings:
        raise ValueError("scatter_sum: there are no rings to go around")
    middle = other // 2
    halves = [(slice(0, middle), 1), (slice(middle, other), -1)]  # the two ways around a ring
    left = math.prod(rings.sizes)
    for number, ring in enumerate(rings.sizes):
        size, left = size // ring, left // ring
        digit = jax.lax.axis_index(axis) // left % ring
        move = partial(_by_copies if rings.remote else _by_permutes, rings=rings, number=number, axis=axis)

        def mine(step, size=size, ring=ring, digit=digit, block=block):
            return [block((digit - way * (1 + step)) % ring * size, size, half) for half, way in halves]

        def hop(step, sums, mine=mine, move=move):
            return [each + new for each, new in zip(*move(sums, mine, step), strict=True)]

        sums = jax.lax.fori_loop(1, ring, hop, mine(0))
        whole = jnp.concatenate(sums, 1 - dim)
        block = partial(_part_of, whole, dim=dim)
    return whole


def _by_permutes(sums: list, mine: Callable, step: jax.Array, *, rings: Rings, number: int, axis: str) -> tuple:
    """Return (the arrays from both neighbors, the result of `mine(step)`, computed meanwhile)."""
    count = range(math.prod(rings.sizes))
    moved = [jax.lax.ppermute(each, axis, [(index, _neighbor(index, rings.sizes, number, way)) for index in count])
             for each, way in zip(sums, (1, -1), strict=True)]
    # Keep them separate; otherwise XLA fuses the addition into the matmul, which then waits for the transfer that it
    # should overlap.
    return moved, jax.lax.optimization_barrier(mine(step))


def _by_copies(sums: list, mine: Callable, step: jax.Array, *, rings: Rings, number: int, axis: str) -> tuple:
    """Do the same as `_by_permutes`, with remote copies."""
    from ctllm_jax import ring_copies

    index = jax.lax.axis_index(axis)
    moving = ring_copies.send(sums, [_neighbor(index, rings.sizes, number, way) for way in (1, -1)], axis=axis,
                            barrier=number)
    # XLA does not know what a copy waits for, so the order is explicit: send, compute, wait.
    step, moving = jax.lax.optimization_barrier((step, moving))
    own, moving = jax.lax.optimization_barrier((mine(step), moving))
    return ring_copies.receive(moving), own


def _part_of(array: jax.Array, start: jax.Array, size: int, half: slice, *, dim: int) -> jax.Array:
    along = jax.lax.dynamic_slice_in_dim(array, start, size, dim)
    return along[:, half] if dim == 0 else along[half]


def _neighbor(index: Index, sizes: tuple[int, ...], number: int, way: int) -> Index:
    """Index along the mesh axis of the next device (`way` 1) in one of the rings, or of the previous one (-1)."""
    left, ring = math.prod(sizes[number + 1:]), sizes[number]  # `left` devices lie between neighbors
    digit = index // left % ring
    return index + ((digit + way) % ring - digit) * left
