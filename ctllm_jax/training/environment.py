"""The environment of a run: versions, devices, processors, flags, the implementation of every op."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax

from ctllm_jax.cluster.compilation_cache import describe_directory
from ctllm_jax.cluster.xla_flags import describe_flags
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.kernels.attention import chosen, make_request
from ctllm_jax.kernels.swiglu import chosen as chosen_swiglu
from ctllm_jax.model.lora import lora_parameters

log = logging.getLogger(__name__)


def choose_implementations(config: PretrainConfig, mesh: jax.sharding.Mesh | None = None) -> dict[str, str]:
    """Return op -> the implementation that runs on the mesh's devices, which may be absent; None: on the default
    device.

    Raises:
      UserError: a named one cannot run here, or not with these adapters.
    """
    swiglu = config.compute.swiglu
    if config.lora is not None and {"gate", "up"} & lora_parameters(config.model, config.lora)["blocks"].keys():
        if swiglu not in ("auto", "xla"):
            raise UserError(f"compute.swiglu={swiglu} takes gate and up as they are, and lora.targets adapts them:"
                            " auto and xla can, or leave gate and up out of lora.targets")
        swiglu = "xla"
    model = config.model
    request = make_request(
        length=config.batch.sequence_length, heads=model.num_heads, kv_heads=model.num_kv_heads,
        head_dim=model.head_dim, dtype=config.compute.dtype, sliding_window=model.sliding_window,
        segments=config.isolated, mesh=mesh)
    try:
        return {"attention": chosen(config.compute.attention, request=request),
                "swiglu": chosen_swiglu(swiglu, device=None if mesh is None else mesh.devices.flat[0],
                                        dtype=config.compute.dtype)}
    except ValueError as error:
        raise UserError(str(error)) from None


def describe_environment(config: PretrainConfig) -> dict[str, Any]:
    """Versions, devices, processors, flags, and the implementation of every op."""
    import importlib.metadata

    versions = {}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu", "ctllm_jax"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(), "versions": versions, "command": sys.argv,
        "devices": [str(device.device_kind) for device in jax.devices()], "backend": jax.default_backend(),
        "processes": jax.process_count(), "cpu_count": count_processors(),
        "flags": {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
        "compiler": describe_flags(os.environ), "programs": describe_directory(os.environ),
        "implementations": choose_implementations(config),
    }


def count_processors() -> int | None:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def warn_of_processors(directory: Path) -> None:
    """Warn about a changed number of processors on the CPU backend, which changes the order of sums and so the last
    bits."""
    try:
        before = json.loads((directory / "environment.json").read_text())["cpu_count"]
    except (OSError, KeyError, ValueError):
        return
    now = count_processors()
    if jax.default_backend() == "cpu" and before != now:
        log.warning("%s was started on %s processors and continues on %s: the numbers will differ in the last bits",
                    directory, before, now)
