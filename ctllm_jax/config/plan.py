"""`launch.py plan CONFIG budget=36h|40B topology=NAME`: a run that fits a budget."""

from __future__ import annotations

import re

from pydantic import model_validator

from ctllm_jax.config.base import key
from ctllm_jax.config.pretrain import PretrainConfig

_UNITS = {"h": 3600.0, "d": 86400.0, "min": 60.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_TIME = ("h", "d", "min")


class PlanConfig(PretrainConfig):
    """A run, its budget, and the hardware."""

    budget: str = key(..., "time on the topology (36h, 90min, 3d) or tokens (40B, 300M, 1.2T)")
    topology: str = key(..., "hardware by name: v5p-256, v5litepod-256, 4*v6e-256, h100:8, a3-highgpu-8g")
    mfu: float = key(0.4, "expected model FLOPs utilization, by causal FLOPs; `compile` gives a bound", gt=0, le=1)
    price: float | None = key(None, "price of a chip per hour, in any currency; null: no cost is printed", gt=0)
    output: str | None = key(None, "config file to write, which extends CONFIG; null: none", output="file")

    @model_validator(mode="after")
    def _check_budget(self):
        self.parsed_budget  # noqa: B018 - raises
        return self

    @property
    def parsed_budget(self) -> tuple[str, float]:
        """("seconds", s) or ("tokens", t)."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(h|d|min|K|M|B|T)\s*", self.budget)
        if match is None or not float(match[1]):
            raise ValueError(f"budget={self.budget} must be time (36h, 90min, 3d) or tokens (40B, 300M, 1.2T)")
        return "seconds" if match[2] in _TIME else "tokens", float(match[1]) * _UNITS[match[2]]
