"""Compile a config's real train step for hardware that is not present, and report the results.

TPU: the package libtpu (extra `tpu`); GPU: JAX's CUDA plugin and CUDA's compiler (extra `cuda13`). Both run on a
machine that has neither.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax

from ctllm_jax import sharding
from ctllm_jax.cluster.topology import Topology
from ctllm_jax.cluster.xla_flags import compiler_options
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.preflight.hlo import Collective, Large, Program
from ctllm_jax.preflight.plan import memory_bytes
from ctllm_jax.preflight.roofline import Roofline, roofline
from ctllm_jax.training.environment import choose_implementations
from ctllm_jax.training.run import plan_step

RESERVED = 0.25 * 2**30
"""Bytes of a TPU's memory that its runtime keeps for itself (libtpu has 15.75 of 16 GiB on v5e)."""
GPU_FRACTION = 0.92
"""Share of a GPU's memory for XLA, set by XLA_PYTHON_CLIENT_MEM_FRACTION; CUDA and NCCL need the rest."""


@dataclass(frozen=True)
class Report:
    """The result of a compilation. Bytes are those of one device.

    Attributes:
      fits: whether the program runs in the memory there.
      memory: bytes by kind: parameters, optimizer, batch, temporaries (or `needed`, where the compiler refused).
      capacity: bytes there are.
      estimate: of the temporaries, by arithmetic: gradients, activations, logits.
      collectives: None if this compiler gives no text.
      reason: why it does not fit, or gives no text.
      seconds: of compiling.
      flags: XLA flags of the compilation, in addition to the environment's.
    """

    topology: Topology
    config: PretrainConfig
    mesh: dict[str, int]
    implementations: dict[str, str]
    rows: int
    accumulation: int
    fits: bool
    memory: dict[str, int]
    capacity: int
    estimate: dict[str, int]
    collectives: list[Collective] | None
    largest: list[Large]
    roofline: Roofline
    reason: str
    seconds: float
    flags: dict[str, Any]

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return sum(self.memory.values())


def open_devices(topology: Topology) -> list[Any]:
    """Devices to compile for. Raises UserError if their compiler is not installed, with the package to install."""
    from jax.experimental import topologies

    if topology.is_tpu:
        import importlib.util

        if importlib.util.find_spec("libtpu") is None:
            raise UserError(f"topology={topology.name}: TPU's compiler is not installed: pip install 'ctllm-jax[tpu]'")
        options = {"chips_per_host_bounds": topology.host_bounds, "num_slices": topology.slices}
        if topology.chip.name == "v4":
            options["chip_config_name"] = "megacore"
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=f"{topology.chip.name}:"
                                                f"{topology.shape_name}", **options).devices
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"topology={topology.name}: {str(error).splitlines()[0]}") from None
    from ctllm_jax.cluster.gpu_target import find_gpus

    try:
        return find_gpus(topology.chip.name, topology.shape[0], nodes=topology.slices)
    except (jax.errors.JaxRuntimeError, RuntimeError, AssertionError, KeyError, ImportError) as error:
        raise UserError(f"topology={topology.name}: CUDA's compiler cannot be used here ({str(error).splitlines()[0]});"
                        " pip install 'ctllm-jax[cuda13]'") from None


def compile_step(config: PretrainConfig, topology: Topology, devices: list[Any]) -> Report:
    """Compile the step for these devices. Raises UserError if the mesh does not fit them, as at a run's start."""
    mesh = sharding.make_mesh(config.mesh.model_dump(), devices, nodes=topology.slices)
    implementations = choose_implementations(config, mesh)
    plan = plan_step(config, mesh)
    state = plan.abstract_state
    frozen = {} if plan.abstract_frozen is None else {"frozen parameters": _per_device(plan.abstract_frozen)}
    memory = {**frozen, "parameters": _per_device(state.params), "optimizer": _per_device(state.opt_state),
              "batch": _per_device(plan.abstract_batch)}
    capacity = topology.chip.memory_gib * 2**30
    capacity = int(capacity - RESERVED if topology.is_tpu else capacity * GPU_FRACTION)
    estimate = memory_bytes(config, devices=len(devices), rows=plan.micro_rows, slices=topology.slices)
    estimate = {kind: estimate[kind] for kind in ("gradients", "activations", "logits")}
    options = {}
    if config.compute.xla_flags == "auto":
        options = compiler_options(topology.chip.name, os.environ)
    began = time.perf_counter()
    collectives, largest, reason, fits = None, [], "", True
    try:
        compiled = plan.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
            raise
        fits, reason = False, str(error).replace("RESOURCE_EXHAUSTED: ", "").splitlines()[0]
        memory["temporaries"] = _needed(str(error)) or sum(estimate.values())
    else:
        memory["temporaries"] = _temporaries(compiled.memory_analysis(), memory)
        fits = sum(memory.values()) <= capacity
        try:
            per_slice = len(devices) // topology.slices if topology.slices > 1 else None
            program = Program(compiled.as_text(), per_slice=per_slice)
            collectives, largest = program.collectives(), program.largest()
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            reason = f"the compiler gives no text of this program: {str(error).splitlines()[0][:200]}"
    sizes = {axis: int(size) for axis, size in mesh.shape.items()}
    bound = roofline(config, topology, mesh=sizes, collectives=collectives)
    return Report(topology, config, sizes, implementations, plan.micro_rows, plan.accumulation, fits, memory, capacity,
                  estimate, collectives, largest, bound, reason, time.perf_counter() - began, options)


def changes(config: PretrainConfig, rows: int) -> Iterable[tuple[str, PretrainConfig]]:
    """Equivalent configs that need less memory, cheapest first, each with its changes."""
    order = ("none", "ffn", "attention", "block")
    ladder: list[tuple[str, PretrainConfig]] = []
    remat, chunk = config.compute.remat, config.compute.loss_chunk
    steps = [(rows, remat, chunk)]
    steps += [(rows, each, chunk) for each in order[order.index(remat) + 1:]]
    while rows > 1:
        rows = rows // 2
        steps.append((rows, "block", chunk))
    if chunk > 1024:
        steps.append((rows, "block", 1024))
    for rows, remat, chunk in steps[1:]:
        ladder.append(altered(config, rows=rows, remat=remat, chunk=chunk))
    return ladder


def candidates(config: PretrainConfig, rows: int) -> list[tuple[str, PretrainConfig]]:
    """The candidates of a search: rows per device x remat x loss chunk; all give the same training."""
    counts = sorted({count for count in (1, 2, 4, 8, 16, rows) if count <= max(rows, 16)}, reverse=True)
    return [altered(config, rows=count, remat=remat, chunk=chunk)
            for remat in ("none", "ffn", "attention", "block") for count in counts for chunk in (8192, 4096, 2048)]


def may_fit(config: PretrainConfig, topology: Topology) -> bool:
    """Whether arithmetic, which is rough, leaves hope."""
    needed = sum(memory_bytes(config, devices=topology.devices, rows=config.batch.rows_per_device,
                              slices=topology.slices).values())
    return needed < 1.5 * topology.chip.memory_gib * 2**30


def altered(config: PretrainConfig, *, rows: int, remat: str, chunk: int) -> tuple[str, PretrainConfig]:
    """A config with these settings, and how they are written on the command line."""
    changed = config.model_copy(update={
        "batch": config.batch.model_copy(update={"rows_per_device": rows}),
        "compute": config.compute.model_copy(update={"remat": remat, "loss_chunk": chunk})})
    return f"batch.rows_per_device={rows} compute.remat={remat} compute.loss_chunk={chunk}", changed


def _per_device(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings, on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _temporaries(analysis: Any, memory: dict[str, int]) -> int:
    """Memory of a program besides its arguments: outputs without a donated argument, temporaries, its code.

    Padding of arguments to tiles, which shapes do not show, counts here, too.
    """
    padding = max(0, analysis.argument_size_in_bytes - sum(memory.values()))
    return (analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
            + analysis.generated_code_size_in_bytes + padding)


def _needed(message: str) -> int:
    """The compiler's estimate of a program's memory in bytes; 0 if it gives none."""
    found = re.search(r"\(([\d.]+)([GM])\) exceeds|Used ([\d.]+)([GM]) of", message)
    if found is None:
        return 0
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return int(float(number) * (2**30 if unit == "G" else 2**20))
