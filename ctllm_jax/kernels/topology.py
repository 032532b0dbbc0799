"""Devices of absent TPU chips, for ahead-of-time compilation. Needs libtpu (pip extra tpu), but no TPU."""

from __future__ import annotations

import jax

SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""Chip -> the smallest slice of it that the compiler supports."""


def find_topology(chip: str, *, megacore: bool = False) -> list[jax.Device]:
    """Return the devices of the smallest slice of a chip; with `megacore`, one device for both cores of a v4 chip, as
    meshes need it.

    Raises:
      ValueError: an unknown chip.
      RuntimeError: libtpu is not installed.
    """
    from jax.experimental import topologies

    if chip not in SLICES:
        raise ValueError(f"chip {chip!r} must be one of {', '.join(SLICES)}")
    options = {"chip_config_name": "megacore"} if megacore and chip == "v4" else {}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=SLICES[chip], **options).devices)
