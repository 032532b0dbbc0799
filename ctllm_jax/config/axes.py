"""The names of the mesh axes, from the slowest network to the fastest."""

from collections.abc import Sequence

AXES = REPLICA, DATA, FSDP, TENSOR = ("replica", "data", "fsdp", "tensor")
COPIES = (REPLICA, DATA)
"""Axes along which the parameters are copied."""
BATCH_AXES = (*COPIES, FSDP)
"""Axes along which a batch is split."""


def find_batch_axes(axes: Sequence[str]) -> tuple[str, ...]:
    """Those of BATCH_AXES that a mesh with these axes has; all of them where it has none."""
    return tuple(axis for axis in BATCH_AXES if axis in axes) or BATCH_AXES
