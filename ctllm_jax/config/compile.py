"""`launch.py compile CONFIG topology=NAME`: compile a run's step for hardware that is not present."""

from __future__ import annotations

from ctllm_jax.config.base import key
from ctllm_jax.config.pretrain import PretrainConfig


class CompileConfig(PretrainConfig):
    """A run, and the hardware to compile its step for."""

    topology: list[str] = key(..., "hardware by name, one or several: v5p-256, v5litepod-256, v6e:16x16, v5p:4x4x4, 4*v6e-256, tpu7x:4x4x4, h100:8, a3-highgpu-8g", min_length=1)
    search: bool = key(False, "try batch.rows_per_device, compute.remat and compute.loss_chunk, and recommend the fastest that fits")
    attempts: int = key(4, "largest number of compilations for one topology, if the config does not fit or search is on", ge=1)
    output: str | None = key(None, "JSON file to write everything into", output="file")
