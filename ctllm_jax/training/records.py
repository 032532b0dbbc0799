"""Records of a run: at its start, and for its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from ctllm_jax.cluster.chips import find_chip
from ctllm_jax.model.flops import flops_per_token
from ctllm_jax.model.lora import count_adapters
from ctllm_jax.model.parameters import count_parameters
from ctllm_jax.training.environment import describe_environment

if TYPE_CHECKING:
    from ctllm_jax.training.run import Run

_FULL = 0.99
"""Rows with at least this share of tokens count as full."""


def describe_run(run: Run) -> dict[str, Any]:
    """The "start" record of a run, for the banner and for metrics.jsonl."""
    config = run.config
    flops = flops_per_token(config.model, sequence_length=config.batch.sequence_length, lora=config.lora)
    devices = jax.devices()
    return {
        "how": run.how, "step": run.start, "steps": config.steps, "parameters": count_parameters(config.model),
        **({} if config.lora is None else {"trained_parameters": count_adapters(config.model, config.lora)}),
        "devices": f"{len(devices)} x {devices[0].device_kind}", "mesh": dict(run.mesh.shape),
        "tokens_per_step": run.data.tokens_at(config.steps) / config.steps if is_padded(run) else config.batch.tokens,
        "flops_per_token": flops._asdict(),
        "implementations": describe_environment(config)["implementations"], "compile_seconds": run.compile_seconds,
        "micro_rows": run.micro_rows, "accumulation": run.accumulation,
        "tokens_per_source": run.data.tokens_per_source(config.steps), "epochs": run.data.epochs(config.steps),
        "data": getattr(run.data, "report", None), "config": config.model_dump(mode="json"),
    }


def is_padded(run: Run) -> bool:
    """Whether a considerable part of the run's rows is padding, which token counts exclude."""
    return run.data.tokens_at(run.config.steps) < _FULL * run.config.tokens_at(run.config.steps)


def make_record(run: Run) -> Callable[[int, dict[str, float], dict[str, float]], dict[str, Any]]:
    """`(step, metrics, timing) -> the record of a "train" event` of metrics.jsonl."""
    config = run.config
    flops = flops_per_token(config.model, sequence_length=config.batch.sequence_length, lora=config.lora)
    devices = jax.devices()
    chip = find_chip(devices[0].device_kind)
    padded, before = is_padded(run), run.start

    def record(step: int, metrics: dict[str, float], timing: dict[str, float]) -> dict[str, Any]:
        nonlocal before
        since = before if before < step else step - 1  # after a rollback the step falls
        tokens, before = run.data.tokens_at(step), step
        tokens_per_second = (tokens - run.data.tokens_at(since)) / (step - since) / timing["step_seconds"]
        result = {"step": step, "tokens": tokens, "loss": metrics["loss"], **run.objective.describe(metrics),
                  "grad_norm": metrics["grad_norm"], "lr": metrics["lr"], "tokens_per_second": tokens_per_second,
                  **({"padded_tokens_per_second": config.batch.tokens / timing["step_seconds"]} if padded else {}),
                  **timing, "eta_seconds": (config.steps - step) * timing["step_seconds"]}
        result |= {name: int(metrics[name]) for name in ("bad_steps", "spikes") if name in metrics}
        if chip is not None:
            peak = chip.peak_flops * len(devices)
            result |= {"mfu_causal": flops.causal * tokens_per_second / peak,
                       "mfu_full": flops.full * tokens_per_second / peak}
        return result

    return record
