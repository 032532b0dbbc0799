"""Estimate a run's steps, tokens, epochs, memory, disk and hours by arithmetic, without a device."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from ctllm_jax.cluster.chips import CHIPS, Chip, find_chip
from ctllm_jax.config.axes import AXES, FSDP, TENSOR
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.model.flops import flops_per_token
from ctllm_jax.model.lora import count_adapters
from ctllm_jax.model.parameters import count_parameters

MANY_EPOCHS = 4.0
"""Repeated data is worth about as much as new data up to here (arXiv 2305.16264)."""
EXPECTED_MFU = 0.4
"""Share of the peak that the expected hours assume, of causal FLOPs."""
OFFERS = (("H100", "NVIDIA H100", 1), ("8 x H100", "NVIDIA H100", 8), ("v5e-8", "TPU v5e", 8),
          ("v5e-256", "TPU v5e", 256), ("v5p-64 (32 chips)", "TPU v5p", 32), ("v6e-256", "TPU v6e", 256))


def hours(config: PretrainConfig, chip: Chip, count: int) -> float:
    """Expected hours of a whole run on `count` chips at EXPECTED_MFU."""
    flops = flops_per_token(config.model, sequence_length=config.batch.sequence_length, lora=config.lora).causal
    return config.tokens_at(config.steps) * flops / (chip.peak_flops * count * EXPECTED_MFU) / 3600


def count_trained(config: PretrainConfig) -> int:
    """Parameters that have a gradient and an optimizer state: all, or the adapters alone."""
    return count_parameters(config.model) if config.lora is None else count_adapters(config.model, config.lora)


def checkpoint_bytes(config: PretrainConfig) -> dict[str, int]:
    """Bytes of a resumable checkpoint and of a milestone: float32 weights, and two moments for the optimizer."""
    weights = 4 * count_trained(config)
    return {"resumable": 3 * weights, "milestone": 3 * weights if config.checkpoint.milestone_optimizer else weights}


def checkpoints_kept(config: PretrainConfig, *, tokens: int | None = None) -> dict[str, int]:
    """Largest number of checkpoints of each kind on disk, plus one resumable that is being written.

    `tokens` are those of the whole run; None: all of its batches are full.
    """
    saved = sorted({*range(config.checkpoint.every, config.steps, config.checkpoint.every), config.steps})
    kept = set(saved[-config.checkpoint.keep_last:])
    if config.checkpoint.keep_every:
        kept.update(step for step in saved if step % config.checkpoint.keep_every == 0)
    trained = (config.tokens_at(config.steps) if tokens is None else tokens) / 1e9
    milestones = sum(milestone <= trained for milestone in config.checkpoint.milestones)
    return {"resumable": len(kept) + (len(saved) > len(kept)), "milestone": milestones}


def axis_sizes(config: PretrainConfig, *, devices: int, slices: int = 1) -> dict[str, int]:
    """Devices along each axis of the mesh; 1 where they are fewer than the config's mesh takes."""
    sizes = {axis: getattr(config.mesh, axis) or slices for axis in AXES}  # only replica may be None
    given = math.prod(max(size, 1) for size in sizes.values())
    return {axis: max(devices // given, 1) if size == -1 else size for axis, size in sizes.items()}


def memory_bytes(config: PretrainConfig, *, devices: int, rows: int, slices: int = 1) -> dict[str, int]:
    """Bytes on each device, estimated: `rows` rows computed at once, parameters split over mesh.fsdp and mesh.tensor.

    Activations are counted by the remat rung, logits by loss_chunk; a compilation for the device gives the exact
    figure. Of the activations, heads and FFN are split over mesh.tensor, and the residual stream is whole on each of
    its devices.
    """
    model, sizes = config.model, axis_sizes(config, devices=devices, slices=slices)
    split, tensor = sizes[FSDP] * sizes[TENSOR], sizes[TENSOR]
    trained = 4 * count_trained(config) // split
    item = 2 if config.compute.dtype == "bfloat16" else 4
    # Under LoRA the weights stay in the dtype of the matmuls.
    frozen = {} if config.lora is None else {"frozen parameters": item * count_parameters(model) // split}
    heads, ffn = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim // tensor, model.ffn_size // tensor
    # Of "none", compiled for v5e (D 512, F 1,536, 8 layers): 970, 706 and 588 MiB of temporaries with mesh.tensor 1, 2
    # and 4; this arithmetic gives 1,088, 774 and 617.
    width = {"block": model.hidden_size, "attention": model.hidden_size + heads,
             "ffn": 4 * model.hidden_size + 2 * heads, "none": 12 * model.hidden_size + 2 * heads + 3 * ffn}
    tokens = rows * config.batch.sequence_length
    kept = tokens * width[config.compute.remat] * model.num_layers * item
    working = tokens * (width["none"] * item)
    logits = 2 * 4 * min(config.compute.loss_chunk, tokens) * model.padded_vocab_size // tensor
    return {**frozen, "parameters": trained, "gradients": trained, "optimizer": 2 * trained,
            "activations": kept + working, "logits": logits}


def free_disk(directory: Path) -> int:
    """Free bytes on the disk of an existing or future directory."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def describe(config: PretrainConfig, *, directory: Path, epochs: Mapping[str, float] | None,
             tokens_per_source: Mapping[str, int] | None, device_kind: str | None = None,
             devices: int = 1) -> tuple[list[tuple[str, str]], list[str]]:
    """The plan of a run: rows (what, how much), and warnings.

    Args:
      epochs, tokens_per_source: of the data, if it can be opened.
      device_kind, devices: hardware for the estimates; None: common offers.
    """
    tokens = sum(tokens_per_source.values()) if tokens_per_source else config.tokens_at(config.steps)
    flops = flops_per_token(config.model, sequence_length=config.batch.sequence_length, lora=config.lora)
    parameters = count_parameters(config.model)
    batch = config.batch
    most = "at most " if tokens < config.tokens_at(config.steps) else ""  # rows of dialogues are padded
    rows = [("steps", f"{config.steps:,} of {most}{batch.tokens:,} tokens"
                      f" ({batch.rows} rows of {batch.sequence_length:,})"),
            ("tokens", f"{tokens:,} ({tokens / parameters:.1f} a parameter)"),
            ("parameters", f"{parameters:,}" if config.lora is None else
             f"{parameters:,} frozen, {count_trained(config):,} trained ({count_trained(config) / parameters:.2%})"),
            ("FLOPs a token", f"{flops.causal / 1e6:,.1f} M causal, {flops.full / 1e6:,.1f} M full")]
    warnings = []
    for source, count in (tokens_per_source or {}).items():
        passes = (epochs or {}).get(source, 0.0)
        rows.append((f"source {source}", f"{count:,} tokens, {passes:.2f} epochs"))
        if passes > MANY_EPOCHS:
            warnings.append(f"source {source} is seen {passes:.1f} times: above {MANY_EPOCHS:g} epochs,"
                            " repeating helps little")
    parts = max(devices // axis_sizes(config, devices=devices)[TENSOR], 1)  # of the batch
    memory = memory_bytes(config, devices=devices, rows=batch.rows_per_device or max(batch.rows // parts, 1))
    shown = ", ".join(f"{name} {_gib(size)}" for name, size in memory.items())
    rows.append((f"memory on each of {devices}", f"about {_gib(sum(memory.values()))} ({shown})"))
    chip = find_chip(device_kind) if device_kind else None
    if chip is not None and sum(memory.values()) > chip.memory_gib * 2**30:
        warnings.append(f"about {_gib(sum(memory.values()))} a device, and a {chip.name} has {chip.memory_gib:g} GiB:"
                        " lower batch.rows_per_device, raise mesh.fsdp, or choose a stronger compute.remat")
    sizes, kept = checkpoint_bytes(config), checkpoints_kept(config, tokens=tokens)
    need = sum(sizes[kind] * kept[kind] for kind in sizes)
    parts = [f"{kept[kind]} {kind} x {_gib(sizes[kind])}" for kind in sizes if kept[kind]]
    free = free_disk(directory)
    rows.append(("checkpoints", f"{' + '.join(parts)} = {_gib(need)}; {_gib(free)} free at {directory}"))
    if need > free:
        warnings.append(f"checkpoints need {_gib(need)}, and {directory} has {_gib(free)} free:"
                        " lower checkpoint.keep_last, or point run.dir elsewhere")
    if chip is not None:
        offers = [(f"{devices} x {chip.name}", chip, devices)]
    else:
        offers = [(name, CHIPS[kind], count) for name, kind, count in OFFERS]
    rows.append((f"hours at {EXPECTED_MFU:.0%} MFU", ", ".join(f"{name}: {_hours(hours(config, chip, count))}"
                                                             for name, chip, count in offers)))
    if device_kind and chip is None:
        rows.append(("hours here", f"unknown for {device_kind}: a run shows its ETA from its first steps on"))
    return rows, warnings


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.1f} MiB"


def _hours(value: float) -> str:
    return f"{value:,.1f} h" if value >= 0.1 else f"{value * 3600:,.0f} s"

