"""Cases of `launch.py kernels`: each op lists its checks, benchmarks and compiles in its own module `cases`.

The functions of a case take the name of an implementation. Like the op itself, they raise ValueError if it cannot run
here; this is shown with its reason, and does not count as a failure.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

OPS = ("attention", "swiglu", "ring")
"""Ops with a module `ctllm_jax.kernels.OP.cases`, which has `checks()`, `benches(...)` and `compiles(chips)`."""


class Check(NamedTuple):
    """Comparison of one case with float64 on the host.

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
      sizes: the sizes that other libraries need for the same computation.
    """

    op: str
    case: str
    flops: float
    implementations: tuple[str, ...]
    prepare: Callable[[str], tuple[Callable, tuple]]
    sizes: dict[str, Any]


class Compile(NamedTuple):
    """One kernel to compile ahead of time, for a chip that may be absent.

    Attributes:
      chip, op, case: what is compiled, and for which chip.
      vmem: our estimate of the on-chip memory (VMEM, or shared memory) that the kernel uses, in bytes.
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
