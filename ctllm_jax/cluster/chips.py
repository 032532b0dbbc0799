"""Data of the chips by JAX's device kind. Peak figures are the vendors', dense and in bf16.

Sources: Google Cloud's pages of each TPU generation (architecture tables), NVIDIA's data sheets (SXM versions).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them: a TPU v7x chip is two, a TPU v4 chip (megacore) one.

    Attributes:
      name: the chip's name for users.
      peak_flops: bf16 multiply-adds counted twice, a second.
      memory_gib: of high-bandwidth memory.
      memory_bandwidth: bytes a second from and to it.
      link_bandwidth: bytes a second that the device sends over all of its links to its neighbors in a slice or a node,
        one way.
      network_bandwidth: bytes a second that it sends to other slices or nodes, one way.
    """

    name: str
    peak_flops: float
    memory_gib: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float


_V4 = Chip("v4", 275e12, 32, 1228e9, 300e9, 3.125e9)
_V5E = Chip("v5e", 197e12, 16, 819e9, 200e9, 3.125e9)
_V5P = Chip("v5p", 459e12, 95, 2765e9, 600e9, 6.25e9)
_V6E = Chip("v6e", 918e12, 32, 1640e9, 400e9, 12.5e9)
CHIPS = {
    "TPU v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": Chip("tpu7x", 1153.5e12, 96, 3690e9, 300e9, 6.25e9),
    "NVIDIA A100": Chip("a100", 312e12, 80, 2039e9, 300e9, 25e9),
    "NVIDIA H100": Chip("h100", 989.4e12, 80, 3350e9, 450e9, 50e9),
    "NVIDIA H200": Chip("h200", 989.4e12, 141, 4800e9, 450e9, 50e9),
    "NVIDIA B200": Chip("b200", 2250e12, 180, 8000e9, 900e9, 50e9),
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`: the longest name that it begins with; None for a CPU or a stranger."""
    names = [name for name in CHIPS if device_kind.startswith(name)]
    return CHIPS[max(names, key=len)] if names else None
