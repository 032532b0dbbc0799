"""Detect this machine's accelerators by PCI bus and drivers, before jax is imported. No jax."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

BUS = Path("/sys/bus/pci/devices")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_GOOGLE, _NVIDIA = "0x1ae0", "0x10de"
# As jax/_src/hardware_utils.py numbers them.
_TPUS = {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "tpu7x"}
# The PCI ID Repository (pci-ids.ucw.cz): SXM, PCIe and NVL cards of a name.
_GPUS = {"0x20b0": "a100", "0x20b2": "a100", "0x20b5": "a100", "0x20f1": "a100",
         "0x2321": "h100", "0x2330": "h100", "0x2331": "h100", "0x2339": "h100",
         "0x2335": "h200", "0x233b": "h200", "0x2901": "b200"}
_DISPLAY = ("0x0300", "0x0302")
"""Classes of a GPU; its sound and bridge devices have others."""


@dataclass(frozen=True)
class Accelerators:
    """Chips of this machine.

    Attributes:
      platform: tpu or gpu.
      chip: as `ctllm_jax.cluster.chips.Chip.name`; "" for other cards.
      count: how many, of which a process need not see all.
    """

    platform: str
    chip: str
    count: int


def find_accelerators(environment: Mapping[str, str], *, bus: Path = BUS) -> Accelerators | None:
    """The TPUs or NVIDIA GPUs of this machine; None if there are none, or JAX_PLATFORMS excludes them."""
    wanted = [name for name in environment.get("JAX_PLATFORMS", "").split(",") if name]
    found: dict[str, list[str]] = {"tpu": [], "gpu": []}
    for device in sorted(bus.glob("*")):
        vendor, number = _read(device / "vendor"), _read(device / "device")
        if vendor == _GOOGLE and number in _TPUS:
            found["tpu"].append(_TPUS[number])
        elif vendor == _NVIDIA and _read(device / "class")[:6] in _DISPLAY:
            found["gpu"].append(_GPUS.get(number, ""))
    for platform, names in (("tpu", ("tpu",)), ("gpu", ("gpu", "cuda"))):
        if found[platform] and (not wanted or wanted[0] in names):
            return Accelerators(platform, found[platform][0], len(found[platform]))
    return None


def nvidia_driver(path: Path = NVIDIA_DRIVER) -> tuple[int, ...] | None:
    """Version of NVIDIA's kernel driver, such as (580, 95, 5); None if there is none."""
    match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", _read(path) + " ")
    return tuple(map(int, match[1].split("."))) if match else None


def cuda_extra(driver: tuple[int, ...]) -> str | None:
    """The extra of setup.cfg whose CUDA this driver supports; None if it is too old for both.

    CUDA 13 needs driver 580, CUDA 12 driver 525 (CUDA's release notes, minor version compatibility).
    """
    return "cuda13" if driver >= (580,) else "cuda12" if driver >= (525,) else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
