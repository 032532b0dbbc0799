"""SwiGLU kernels on a mesh, where XLA cannot partition them."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec


def over_mesh(function: Callable[..., jax.Array], x: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, *, mesh: Mesh,
              batch_axes: tuple[str, ...], weight_axis: str, tensor_axis: str) -> jax.Array:
    """Run `function(x, gate, up)` on each device's rows of x and columns of the weights.

    D is gathered over `weight_axis` first; in the backward pass the weights' gradients are scattered over it.

    Args:
      x: [B, ..., D]; B is sharded over `batch_axes`, which must divide it.
      gate_DF, up_DF: [D, F]; D is sharded over `weight_axis`, F over `tensor_axis`.

    Returns:
      [B, ..., F], sharded over `batch_axes` and `tensor_axis`.
    """
    def local(x: jax.Array, gate: jax.Array, up: jax.Array) -> jax.Array:
        gate, up = (jax.lax.all_gather(weight, weight_axis, axis=0, tiled=True) for weight in (gate, up))
        return function(x, gate, up)

    between = [None] * (x.ndim - 2)
    weight = PartitionSpec(weight_axis, tensor_axis)
    # A kernel's outputs do not declare over which axes they vary, so shard_map has nothing to check.
    return jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(batch_axes), weight, weight), check_vma=False,
                         out_specs=PartitionSpec(batch_axes, *between, tensor_axis))(x, gate_DF, up_DF)
