"""What `launch.py kernels` runs: each op lists its checks, benchmarks and compiles in a module `cases` of its own.

A case is made by functions that take the name of an implementation; they raise ValueError, as the op itself does, where
that cannot run here, which is shown with its reason and is no failure.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

OPS = ("attention", "swiglu", "ring")
"""Ops with a module `ctllm_jax.kernels.OP.cases`, which has `checks()`, `benches(...)` and `compiles(chips)`."""


class Check(NamedTuple):
    """Numbers of one case against float64 on the host.

    Attributes:
      op, case: what is checked.
      compare: `implementation -> {what: (largest error, tolerance)}`; an error that is not finite fails too.
    """

    op: str
    case: str
    compare: Callable[[str], dict[str, tuple[float, float]]]


class Bench(NamedTuple):
    """Time of one case.

    Attributes:
      op, case: what is timed.
      flops: of one call.
      implementations: names to time.
      prepare: `implementation -> (function, arguments)`; the function is jitted.
      sizes: what other libraries need to do the same.
    """

    op: str
    case: str
    flops: float
    implementations: tuple[str, ...]
    prepare: Callable[[str], tuple[Callable, tuple]]
    sizes: dict[str, Any]


class Compile(NamedTuple):
    """One kernel compiled ahead of time, for a chip that need not be here.

    Attributes:
      chip, op, case: what is compiled, and for which chip.
      vmem: bytes of the chip's own memory (VMEM, or shared memory) that the kernel takes, by our own count.
      lower: `() -> jax.stages.Lowered`.
    """

    chip: str
    op: str
    case: str
    vmem: int
    lower: Callable[[], Any]


def gather(what: str, ops: Iterable[str] = OPS, **options: Any) -> list[Any]:
    """The `checks`, `benches` or `compiles` of some ops."""
    return [case for op in ops for case in getattr(importlib.import_module(f"ctllm_jax.kernels.{op}.cases"), what)(
        **options)]
