"""Low-rank adapters on frozen weights (`lora`), and `launch.py lora`."""

from __future__ import annotations

import math
import re

from pydantic import field_validator

from ctllm_jax.config.base import Section, key

ALL_PROJECTIONS = "blocks/(query|key|value|out|gate|up|down)$"


class LoraConfig(Section):
    """Adapters trained in addition to the frozen weights: y = x·W + scale · x·A·B for each target (arXiv
    2106.09685)."""

    rank: int = key(16, "columns of A, rows of B", ge=1)
    alpha: float = key(32.0, "the scale is alpha / rank: alpha can stay as it is when the rank changes", gt=0)
    targets: str = key(ALL_PROJECTIONS, "regular expression, searched in the paths of parameters, such as blocks/query; it must match only projections of a block")
    rslora: bool = key(False, "scale by alpha / sqrt(rank) instead, for ranks of 64 and more (arXiv 2312.03732)")

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"targets={value!r} is no regular expression: {error}") from None
        return value

    @property
    def scale(self) -> float:
        """Factor on A·B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraMergeConfig(Section):
    """`launch.py lora merge RUN`."""

    output: str = key(..., "run directory to write: a MODEL like any other, without adapters", output="folder")
    base: str | None = key(None, "MODEL that the adapters belong to, if it has moved; null: its recorded path")
