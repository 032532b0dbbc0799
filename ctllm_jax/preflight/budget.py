"""Fit a run to a budget of time or tokens: steps, warm-up, schedule, and cost. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ctllm_jax.cluster.saving import save_seconds
from ctllm_jax.cluster.topology import Topology
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.plan import PlanConfig
from ctllm_jax.model.flops import flops_per_token
from ctllm_jax.model.parameters import count_parameters
from ctllm_jax.preflight.plan import checkpoint_bytes
from ctllm_jax.preflight.roofline import recomputed_share

WARMUP_SHARE = 0.05
"""Largest warm-up share of a run; fewer steps in the config are kept."""
DECAY_SHARE = 0.2
"""Falling part of a WSD run (arXiv 2405.18392 finds 10 to 20 % as good as a cosine)."""
DISK_BANDWIDTH = 1e9
"""Bytes a second at which a host writes its part of a checkpoint; a network disk's, roughly."""
LEAST_STEPS = 10


@dataclass(frozen=True)
class Budgeted:
    """A run that fits.

    Attributes:
      steps, tokens: of the run.
      overrides: keys for the start of the run, in addition to the config's.
      seconds: of the steps at the expected MFU.
      drivers: (what, how much) of where the time, money and room go.
    """

    steps: int
    tokens: int
    overrides: dict[str, Any]
    seconds: float
    drivers: list[tuple[str, str]]


def fit(config: PlanConfig, topology: Topology) -> Budgeted:
    """The longest run within the budget. Raises UserError if the budget is below ten steps, with the cost of ten."""
    model, batch = config.model, config.batch
    flops = flops_per_token(model, sequence_length=batch.sequence_length, lora=config.lora)
    speed = topology.chip.peak_flops * topology.devices * config.mfu / flops.causal
    kind, amount = config.parsed_budget
    tokens = amount if kind == "tokens" else amount * speed
    steps = int(tokens // batch.tokens)
    if steps < LEAST_STEPS:
        least = LEAST_STEPS * batch.tokens
        raise UserError(f"budget={config.budget}: that is {steps} steps of {batch.tokens:,} tokens; {LEAST_STEPS} take "
                        f"{least:,} tokens or {least / speed / 60:,.1f} min on {topology.name}: raise it, or lower "
                        "batch.tokens")
    tokens = steps * batch.tokens
    seconds = tokens / speed
    return Budgeted(steps, tokens, choose_keys(config, steps), seconds,
                    cost_drivers(config, topology, steps=steps, seconds=seconds))


def choose_keys(config: PlanConfig, steps: int) -> dict[str, Any]:
    """Steps, and the parts of schedule and intervals that depend on them."""
    optimizer = config.optimizer
    keys: dict[str, Any] = {"steps": steps}
    warmup = min(optimizer.warmup_steps, max(1, round(WARMUP_SHARE * steps))) if optimizer.warmup_steps else 0
    if warmup != optimizer.warmup_steps:
        keys["optimizer.warmup_steps"] = warmup
    if optimizer.schedule == "wsd":
        keys["optimizer.decay_steps"] = max(1, round(DECAY_SHARE * steps))
    for name, every, times in (("checkpoint.every", config.checkpoint.every, 4),
                               ("evaluation.every", config.evaluation.every, 4),
                               ("sample.every", config.sample.every, 4)):
        if every and every > max(1, steps // times):
            keys[name] = max(1, steps // times)
    return keys


def cost_drivers(config: PlanConfig, topology: Topology, *, steps: int, seconds: float) -> list[tuple[str, str]]:
    """The use of FLOPs, time, money and disk space."""
    model, batch = config.model, config.batch
    flops = flops_per_token(model, sequence_length=batch.sequence_length, lora=config.lora)
    layers = model.num_layers
    head = _passes(config) * model.hidden_size * model.padded_vocab_size
    ffn = _passes(config) * 3 * model.hidden_size * model.ffn_size * layers
    full_attention = flops.full - flops.causal
    attention = flops.causal - _matmuls(config)
    parts = {"FFN": ffn, "attention's projections": _matmuls(config) - head - ffn, "attention, causal": attention,
             "head": head}
    rows = [("FLOPs", ", ".join(f"{name} {value / flops.causal:.0%}" for name, value in parts.items())),
            ("recomputation", f"compute.remat={config.compute.remat} adds {recomputed_share(config):.0%}"),
            ("uncut attention", f"counted to all tokens, attention adds {full_attention / flops.causal:.0%}")]
    chips = topology.chips
    rows.append(("chip hours", f"{chips * seconds / 3600:,.1f} of {chips} {topology.chip.name}, at "
                               f"{config.mfu:.0%} MFU" + ("" if config.price is None else
                                                          f": {config.price * chips * seconds / 3600:,.0f}")))
    parameters = count_parameters(model)
    tokens = steps * batch.tokens
    rows.append(("tokens a parameter", f"{tokens / parameters:,.1f} (20 make the smallest loss for the FLOPs, "
                                       "arXiv 2203.15556; CT-LLM has 588)"))
    size = checkpoint_bytes(config)["resumable"]
    stall = save_seconds(size, machines=topology.hosts, write=DISK_BANDWIDTH)
    rows.append(("a checkpoint", f"{size / 2**30:,.1f} GiB, {stall:,.1f} s at 1 GB/s a host and with checksums,"
                                 " beside the steps; every "
                                 f"{config.checkpoint.every:,} steps"))
    rows.append(("data", f"{batch.tokens / (seconds / steps) / 1e6:,.2f} M tokens/s in all, "
                         f"{batch.tokens / (seconds / steps) / topology.hosts / 1e6:,.3f} M a host"))
    return rows


def _matmuls(config: PlanConfig) -> float:
    """FLOPs a token of all matmuls with weights that are there without adapters."""
    model = config.model
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    block = model.hidden_size * (heads + 3 * model.ffn_size)
    return _passes(config) * (block * model.num_layers + model.hidden_size * model.padded_vocab_size)


def _passes(config: PlanConfig) -> int:
    """FLOPs of a token for each weight: two forward, four backward, of which a frozen weight needs two."""
    return 6 if config.lora is None else 4
