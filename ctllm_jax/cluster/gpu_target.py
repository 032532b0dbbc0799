"""GPUs described to the CUDA compiler, which then compiles for them on a machine without one.

It needs JAX's CUDA plugin (jax-cuda13-plugin and jax-cuda13-pjrt of jaxlib's version, as in the extra `cuda13`) and
CUDA's compilers: an installed toolkit, or nvidia-cuda-nvcc, nvidia-nvvm and nvidia-cuda-runtime from pip.

The figures are those that CUDA reports of the SXM cards (cudaDeviceProp) and that the CUDA programming guide lists by
compute capability.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GPU:
    """Properties of a card; shared memory in bytes per block (opt-in) and per multiprocessor."""

    name: str
    capability: tuple[int, int]
    cores: int
    memory: int
    bandwidth: int
    l2_cache: int
    clock_ghz: float
    shared_optin: int = 232448
    shared_core: int = 233472


GPUS = {
    "a100": GPU("NVIDIA A100-SXM4-80GB", (8, 0), 108, 85_899_345_920, 2_039_000_000_000, 41_943_040, 1.41,
                166912, 167936),
    "h100": GPU("NVIDIA H100 80GB HBM3", (9, 0), 132, 84_942_979_072, 3_352_320_000_000, 52_428_800, 1.98),
    "h200": GPU("NVIDIA H200", (9, 0), 132, 150_000_000_000, 4_800_000_000_000, 62_914_560, 1.98),
    "b200": GPU("NVIDIA B200", (10, 0), 148, 191_514_411_008, 7_672_320_000_000, 132_644_864, 1.965),
}
CUDA, CUDNN = (13, 0, 0), (9, 12, 0)


def target_config(name: str) -> str:
    """The `target_config` of `jax.experimental.topologies.get_topology_desc` for a GPU of GPUS, as protobuf text."""
    gpu = GPUS[name]
    major, minor = gpu.capability
    # From Hopper on there are instructions (wgmma, TMA) that only the exact architecture has.
    exact = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    cuda, cudnn = (".".join(map(str, version)) for version in (CUDA, CUDNN))
    device = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 49152,
        "shared_memory_per_core": gpu.shared_core, "threads_per_core_limit": 2048, "core_count": gpu.cores,
        "fpus_per_core": 64 if major == 8 else 128, "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535, "memory_bandwidth": gpu.bandwidth, "l2_cache_size": gpu.l2_cache,
        "clock_rate_ghz": gpu.clock_ghz, "device_memory_size": gpu.memory,
        "shared_memory_per_block_optin": gpu.shared_optin, "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536, "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64, "device_address_bits": 64,
    }
    lines = [f"  {field}: {value}" for field, value in device.items()]
    lines += [f"  cuda_compute_capability {{ major: {major} minor: {minor} {exact} }}", "  ecc_enabled: true",
              f'  device_vendor: "NVIDIA Corporation"\n  name: "{gpu.name}"', f'  driver_version: "{cuda}"',
              f'  runtime_version: "{cuda}"\n  compile_time_toolkit_version: "{cuda}"\n  dnn_version: "{cudnn}"']
    version = " ".join(f"{name}: {value}" for name, value in zip(("major", "minor", "patch"), CUDNN, strict=True))
    return ("gpu_device_info {\n" + "\n".join(lines) + "\n}\n"
            f'platform_name: "CUDA"\ndnn_version_info {{ {version} }}\ndevice_description_str: "{gpu.name}"\n')


def missing_packages() -> list[str]:
    """The missing parts of JAX's CUDA plugin."""
    missing = []
    for name in ("jax_cuda13_plugin", "jax_plugins.xla_cuda13"):
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            missing.append(name)
    return missing


def find_gpus(name: str, count: int = 1, *, nodes: int = 1, description: str | None = None) -> list[Any]:
    """The `jax.Device`s of nodes with this many GPUs of GPUS each, which may be absent.

    Args:
      description: XLA's protobuf text of another card, instead of ours.

    Raises:
      RuntimeError: the plugin is not installed; its own errors where CUDA's compilers are not.
    """
    from jax.experimental import topologies

    if missing := missing_packages():
        raise RuntimeError(f"JAX's CUDA plugin is not installed: {', '.join(missing)}")
    return list(topologies.get_topology_desc(
        platform="cuda", topology_name=name, topology=f"1x{nodes}x{count}",
        target_config=description or target_config(name)).devices)
