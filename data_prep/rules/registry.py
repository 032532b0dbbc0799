"""The register of rules: what is measured of a document, and how the rest of the pipeline finds it.

A rule is a pure function of a `View` that returns one number; whether a document stays is decided by the bounds of a
rule set (`sets.py`), never here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_prep.rules.view import View

BINS = 40


@dataclass(frozen=True)
class Bounds:
    """The values that are kept: low ≤ value ≤ high, or low < value where `above` is set."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def keeps(self, value: float) -> bool:
        """Whether a document with this value stays."""
        return (value > self.low if self.above else value >= self.low) and value <= self.high


@dataclass(frozen=True)
class Rule:
    """One rule.

    `code` is its number in CT-LLM's table (G: rules of Gopher for English; E: damage); `version` counts changes
    of the value; `cost` orders the rules of a set, cheap ones first (about microseconds for 5,000 characters);
    `edges` are the histogram edges of a report. `language` (zh, en or any) and `domain` (prose or any) say which text
    the rule can judge; they explain why a set leaves it out, and put it into no set.
    """

    name: str
    code: str
    version: int
    default: Bounds
    cost: int
    edges: tuple[float, ...]
    measure: Callable[[View], float]
    language: str = "zh"
    domain: str = "prose"

    @property
    def doc(self) -> str:
        """What the rule measures, and what was decided where its source leaves it open."""
        return inspect.getdoc(self.measure) or ""


RULES: dict[str, Rule] = {}


def linear(low: float, high: float) -> tuple[float, ...]:
    """Edges of 40 equal bins."""
    return tuple(low + (high - low) * i / BINS for i in range(BINS + 1))


def logarithmic(low: float, high: float) -> tuple[float, ...]:
    """Edges of 40 bins, each wider than the last by the same factor."""
    return tuple(low * (high / low) ** (i / BINS) for i in range(BINS + 1))


FRACTION = linear(0.0, 1.0)


def rule(name: str, code: str, *, low: float = -math.inf, high: float = math.inf, above: bool = False, cost: int,
         edges: tuple[float, ...] = FRACTION, version: int = 1, language: str = "zh", domain: str = "prose"):
    """Decorator that registers a function `view -> float` under `name`. No set asks for it before it lists the name."""
    def register(measure: Callable[[View], float]) -> Callable[[View], float]:
        if name in RULES:
            raise ValueError(f"there are two rules {name}")
        RULES[name] = Rule(name, code, version, Bounds(low, high, above), cost, edges, measure, language, domain)
        return measure
    return register
