"""H100s that are not here, for compiling ahead of time.

Needs CUDA's compilers and JAX's plugin for them (pip jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc, nvidia-nvvm,
nvidia-cuda-runtime), and no GPU.
"""

from __future__ import annotations

import importlib.util

import jax

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  ecc_enabled: true
  name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA asks of the device, as it describes one itself."""
PACKAGES = ("jax_cuda13_plugin", "jax_plugins.xla_cuda13", "nvidia.cu13")


def missing_packages() -> list[str]:
    """What is not installed and needed for `find_hoppers`."""
    missing = []
    for name in PACKAGES:
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            missing.append(name)
    return missing


def find_hoppers(count: int = 1) -> list[jax.Device]:
    """The devices of a host with so many H100.

    Raises:
      RuntimeError: a package is not installed.
    """
    from jax.experimental import topologies

    if missing := missing_packages():
        raise RuntimeError(f"CUDA's compilers are not installed: {', '.join(missing)}")
    return list(topologies.get_topology_desc(platform="cuda", topology_name="h100", target_config=H100,
                                             topology=f"1x1x{count}").devices)
