"""A lower bound of the step time from FLOPs, memory traffic and communication, and the chips' peaks. Pure
arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ctllm_jax.cluster.topology import Topology
from ctllm_jax.config.axes import FSDP, TENSOR
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.model.flops import flops_per_token
from ctllm_jax.model.parameters import count_parameters
from ctllm_jax.preflight.hlo import Collective
from ctllm_jax.preflight.plan import count_trained


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step on one device, each at the maker's peak; the step takes at least `step`.

    Attributes:
      compute: matmuls and causal attention, recomputation included.
      memory: weights, activations, logits and optimizer through high-bandwidth memory, by arithmetic.
      network: everything sent over the links of a slice or node, and between them.
      exposed: the part of it that does not overlap with computation.
      step: the largest of compute, memory and hidden network, and the exposed network on top.
      mfu_causal, mfu_full: bounds that follow, without recomputation.
    """

    compute: float
    memory: float
    network: float
    exposed: float
    step: float
    mfu_causal: float
    mfu_full: float


def recomputed_share(config: PretrainConfig) -> float:
    """FLOPs that remat adds, as a share of those of a step without it; nothing needs a block's last matmul again."""
    model = config.model
    total = flops_per_token(model, sequence_length=config.batch.sequence_length, lora=config.lora).causal
    whole = flops_per_token(model, sequence_length=config.batch.sequence_length).causal
    ffn = 2 * 3 * model.hidden_size * model.ffn_size * model.num_layers
    head = 2 * model.hidden_size * model.padded_vocab_size
    forward = whole / 3 - head
    out = 2 * model.num_heads * model.head_dim * model.hidden_size * model.num_layers
    wide = ffn * 2 / 3
    again = {"none": 0.0, "ffn": wide, "attention": wide + out, "block": forward - ffn / 3}
    return again[config.compute.remat] / total


def memory_traffic(config: PretrainConfig, *, devices: int, split: int, tensor: int) -> float:
    """Bytes a device moves through its memory in a step, at least.

    Args:
      split: devices that share parameters and optimizer (fsdp x tensor).
      tensor: devices that share a matmul.
    """
    model = config.model
    item = 2 if config.compute.dtype == "bfloat16" else 4
    tokens = config.batch.tokens / devices * tensor
    rows = config.batch.rows_per_device or math.ceil(config.batch.rows / devices * tensor)
    micro_batches = max(1.0, config.batch.rows / devices * tensor / rows)
    passes = 3 if config.compute.remat in ("block", "attention") else 2
    weights = count_parameters(model) / tensor * item * passes * micro_batches
    # Each matmul reads its input and writes its output once in a pass; the backward pass has two.
    widths = (6 * model.hidden_size + (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
              + 5 * model.ffn_size)
    activations = tokens * widths / tensor * model.num_layers * item * (passes + 1)
    logits = tokens * model.padded_vocab_size / tensor * (4 + 4 + item * 3)
    optimizer = 7 * 4 * count_trained(config) / split
    return weights + activations + logits + optimizer


def roofline(config: PretrainConfig, topology: Topology, *, mesh: dict[str, int],
             collectives: Sequence[Collective] | None) -> Roofline:
    """The bound of a config's step on a topology; `collectives` of its compiled program, None if unknown.

    The network's time takes all links of a chip at once, which a ring along one direction does not reach.
    """
    chip, devices = topology.chip, topology.devices
    flops = flops_per_token(config.model, sequence_length=config.batch.sequence_length, lora=config.lora)
    tokens = config.batch.tokens / devices
    compute = tokens * flops.causal * (1 + recomputed_share(config)) / chip.peak_flops
    memory = memory_traffic(config, devices=devices, split=mesh[FSDP] * mesh[TENSOR],
                            tensor=mesh[TENSOR]) / chip.memory_bandwidth
    network = exposed = 0.0
    for each in collectives or ():
        seconds = each.sent / (chip.network_bandwidth if each.crosses else chip.link_bandwidth)
        network += seconds
        exposed += 0.0 if each.asynchronous else seconds
    step = max(compute, memory, network - exposed) + exposed
    peak = step * chip.peak_flops
    return Roofline(compute, memory, network, exposed, step, tokens * flops.causal / peak, tokens * flops.full / peak)
