"""The results of CT-LLM's authors, from paper.yaml, which names its sources. No jax."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

_FILE = Path(__file__).with_name("paper.yaml")


class PaperModel(NamedTuple):
    """A model of the paper's tables: `kind` is base, sft or dpo; `is_ours` distinguishes CT-LLM from the models it is
    compared with; `figures` are percent by benchmark."""

    name: str
    kind: str
    is_ours: bool
    figures: Mapping[str, float]


class Paper(NamedTuple):
    """The paper's figures, all in percent.

    Attributes:
      tokens: of the released checkpoints, the final model last.
      checkpoints: benchmark -> a figure for each of `tokens`.
      models: of the comparisons, in the paper's order.
    """

    name: str
    source: str
    tokens: tuple[float, ...]
    checkpoints: Mapping[str, tuple[float, ...]]
    models: tuple[PaperModel, ...]

    def checkpoint(self, index: int) -> PaperModel:
        """A released checkpoint as a model."""
        return PaperModel(self.label(index), "base", True,
                          {name: figures[index] for name, figures in self.checkpoints.items()})

    def label(self, index: int) -> str:
        """`CT-LLM 13.3B`; `CT-LLM final` of the last."""
        last = index in (-1, len(self.tokens) - 1)
        return "CT-LLM final" if last else f"CT-LLM {self.tokens[index] / 1e9:.1f}B"

    def nearest(self, tokens: float) -> int:
        """The index of the checkpoint whose tokens are nearest, by ratio."""
        return min(range(len(self.tokens)),
                   key=lambda index: abs(math.log(self.tokens[index] / max(tokens, 1))))

    def compared(self, *kinds: str, peers: bool) -> list[PaperModel]:
        """The models of these kinds; with `peers` those that CT-LLM is compared with too."""
        return [model for model in self.models if model.kind in kinds and (model.is_ours or peers)]


@functools.cache
def read_paper() -> Paper:
    """The figures of paper.yaml."""
    raw = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    models = tuple(PaperModel(name, each["kind"], each.get("ours", False), each["figures"])
                   for name, each in raw["models"].items())
    return Paper(raw["name"], raw["source"], tuple(billions * 1e9 for billions in raw["tokens"]),
                 {name: tuple(figures) for name, figures in raw["checkpoints"].items()}, models)
