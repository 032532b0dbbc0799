"""Names of hardware that can be rented, as chips, devices and hosts. No jax.

| written | is |
|---|---|
| `v5p:4x4x4`, `v6e:16x16` | a slice by its shape |
| `v5p-256`, `v4-256`, `tpu7x-128` | a slice by its TensorCores, two a chip |
| `v5litepod-256`, `v5e-256`, `v6e-256` | a slice by its chips |
| `4*v6e-256` | four slices, joined by the data center's network |
| `h100:8`, `h200:16`, `b200:8` | GPUs, eight a node |
| `a3-highgpu-8g`, `a3-ultragpu-8g`, `a4-highgpu-8g`, `8*a3-highgpu-8g` | nodes by their machine type |
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ctllm_jax.cluster.chips import CHIPS, Chip
from ctllm_jax.config.errors import UserError

_KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x",
          "a100": "NVIDIA A100", "h100": "NVIDIA H100", "h200": "NVIDIA H200", "b200": "NVIDIA B200"}
_GPUS = ("a100", "h100", "h200", "b200")
_BY_CORES = ("v4", "v5p", "tpu7x")
_FLAT = ("v5e", "v6e")
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x", "7x": "tpu7x"}
_MACHINES = {"a2-ultragpu": "a100", "a3-highgpu": "h100", "a3-megagpu": "h100", "a3-ultragpu": "h200",
             "a4-highgpu": "b200"}
# The usual shape of a slice with this many chips (Google Cloud's tables of supported configurations).
_SHAPES_2D = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_SHAPES_3D = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8),
              512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16), 4096: (16, 16, 16), 6144: (16, 16, 24)}
_PER_NODE = 8
_EXAMPLES = "v5p-256, v5p:4x4x8, v5litepod-256, v6e:16x16, 4*v6e-256, tpu7x:4x4x4, h100:8, a3-highgpu-8g"


@dataclass(frozen=True)
class Topology:
    """Hardware by name.

    Attributes:
      name: as it was written.
      chip: data of one JAX device.
      kind: `jax.Device.device_kind`.
      shape: chips of a slice along each direction of its network; (GPUs of a node,).
      slices: slices, or nodes.
      cores: TensorCores of all chips; 0 for GPUs.
      devices: as JAX counts them, in all.
      hosts: machines, each with its process.
    """

    name: str
    chip: Chip
    kind: str
    shape: tuple[int, ...]
    slices: int
    cores: int
    devices: int
    hosts: int

    @property
    def is_tpu(self) -> bool:
        """Whether it is made of TPUs."""
        return self.kind.startswith("TPU")

    @property
    def chips(self) -> int:
        """Chips in all."""
        return math.prod(self.shape) * self.slices

    @property
    def shape_name(self) -> str:
        """libtpu's form: 4x4x4."""
        return "x".join(map(str, self.shape))

    @property
    def host_bounds(self) -> tuple[int, int, int]:
        """Chips of one host along each direction."""
        chips = math.prod(self.shape) // (self.hosts // self.slices)
        return {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 4, 1)}[chips]

    def describe(self) -> str:
        """One line for people."""
        many = f"{self.slices} {'slices' if self.is_tpu else 'nodes'} of " if self.slices > 1 else ""
        if not self.is_tpu:
            return f"{many}{self.shape[0]} x {self.chip.name}: {self.devices} devices, {self.hosts} hosts"
        return (f"{many}{self.shape_name} {self.chip.name}: {self.chips} chips, {self.cores} cores, "
                f"{self.devices} devices, {self.hosts} hosts")


def parse_topology(name: str) -> Topology:
    """The hardware of a name, as the table above has them.

    Raises:
      UserError: there is no such name or size; the message lists the existing ones.
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*[*x]\s*)?([a-zA-Z][\w]*(?:-[a-z]+gpu)?)(?:[-:](\w+))?\s*", name)
    if match is None:
        raise _unknown(name)
    slices, family, size = int(match[1] or 1), match[2].lower(), (match[3] or "").lower()
    family = _ALIASES.get(family, family)
    if slices < 1:
        raise _unknown(name)
    if family in _MACHINES or family in _GPUS:
        return _gpus(name, slices, family, size)
    if family not in _KINDS:
        raise _unknown(name)
    if "x" in size:
        shape = _shape(name, family, size)
    else:
        shape = _sized(name, family, size)
    chips = math.prod(shape)
    # A v5e or v6e host has one, four or eight chips; eight only if the slice has no others.
    per_host = chips if chips in (1, 8) and family in _FLAT else min(chips, 4)
    kind = _KINDS[family]
    cores = chips * (2 if family in _BY_CORES else 1)
    devices = cores if family == "tpu7x" else chips
    return Topology(name.strip(), CHIPS[kind], kind, shape, slices, cores * slices, devices * slices,
                    chips // per_host * slices)


def _shape(name: str, family: str, size: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(x\d+){1,2}", size):
        raise _unknown(name)
    shape = tuple(map(int, size.split("x")))
    known = _SHAPES_2D.values() if family in _FLAT else None
    wanted = 2 if family in _FLAT else 3
    if len(shape) != wanted or 0 in shape:
        raise UserError(f"topology={name}: the shape of {family} has {wanted} sizes, such as "
                        f"{'16x16' if wanted == 2 else '4x4x4'}")
    if known is not None and shape not in known:
        raise UserError(f"topology={name}: shapes of {family} are {', '.join('x'.join(map(str, s)) for s in known)}")
    if known is None and (shape[0] % 2 or shape[1] % 2) and shape != (1, 1, 1):
        raise UserError(f"topology={name}: a host of {family} is 2x2x1, so the first two sizes must be even")
    return shape


def _sized(name: str, family: str, size: str) -> tuple[int, ...]:
    table = _SHAPES_2D if family in _FLAT else _SHAPES_3D
    cores = 2 if family in _BY_CORES else 1
    if not size.isdigit() or int(size) % cores or int(size) // cores not in table:
        unit = "TensorCores, two a chip" if cores == 2 else "chips"
        raise UserError(f"topology={name}: {family}-N counts {unit}; N is one of "
                        f"{', '.join(str(chips * cores) for chips in table)}, or give a shape, such as "
                        f"{family}:{'4x4' if family in _FLAT else '4x4x4'}")
    return table[int(size) // cores]


def _gpus(name: str, nodes: int, family: str, size: str) -> Topology:
    machine = family in _MACHINES
    count = size.removesuffix("g") if machine else size
    if not count.isdigit() or not int(count):
        raise _unknown(name)
    family, count = _MACHINES.get(family, family), int(count)
    if count > _PER_NODE and (machine or count % _PER_NODE):
        raise UserError(f"topology={name}: a node has at most {_PER_NODE} GPUs; more are a multiple of that")
    nodes, count = nodes * max(1, count // _PER_NODE), min(count, _PER_NODE)
    kind = _KINDS[family]
    return Topology(name.strip(), CHIPS[kind], kind, (count,), nodes, 0, count * nodes, nodes)


def _unknown(name: str) -> UserError:
    return UserError(f"topology={name}: no such hardware is known; names look like {_EXAMPLES}")
