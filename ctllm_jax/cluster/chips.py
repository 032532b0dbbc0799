"""What the chips can do, by the name that JAX gives them. Peak figures are the makers' dense bf16 ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them: a TPU v7x chip is two, a TPU v4 chip (megacore) one.

    Attributes:
      name: as users say it.
      peak_flops: bf16 multiply-adds counted twice, a second.
      memory_gib: of high-bandwidth memory.
    """

    name: str
    peak_flops: float
    memory_gib: float


CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32),
    "TPU v5 lite": Chip("v5e", 197e12, 16),
    "TPU v5e": Chip("v5e", 197e12, 16),
    "TPU v5": Chip("v5p", 459e12, 95),
    "TPU v5p": Chip("v5p", 459e12, 95),
    "TPU v6 lite": Chip("v6e", 918e12, 32),
    "TPU v6e": Chip("v6e", 918e12, 32),
    "TPU7x": Chip("tpu7x", 1153.5e12, 96),
    "NVIDIA A100": Chip("a100", 312e12, 80),
    "NVIDIA H100": Chip("h100", 989.4e12, 80),
    "NVIDIA H200": Chip("h200", 989.4e12, 141),
    "NVIDIA B200": Chip("b200", 2250e12, 180),
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`: the longest name that it begins with; None for a CPU or a stranger."""
    names = [name for name in CHIPS if device_kind.startswith(name)]
    return CHIPS[max(names, key=len)] if names else None
