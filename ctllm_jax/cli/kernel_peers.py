"""Other libraries' kernels, timed by `launch.py kernels bench` for comparison, if they are installed and can run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any


def find_peers(case: Any) -> dict[str, Callable[[], float]]:
    """Name -> `() -> seconds of one call` for the computation of a `Bench` of `kernels.registry`."""
    if case.op == "attention" and not case.sizes["packed"] and _torch_has_cuda():
        return {"torch sdpa": partial(_time_sdpa, **case.sizes)}
    return {}


def _torch_has_cuda() -> bool:
    import jax

    if importlib.util.find_spec("torch") is None or jax.default_backend() != "gpu":
        return False
    import torch

    return torch.cuda.is_available()


def _time_sdpa(*, rows: int, length: int, heads: int, kv_heads: int, head_dim: int, dtype: str, packed: bool,
               backward: bool) -> float:
    """Seconds of one call of PyTorch's scaled_dot_product_attention on the same sizes: the best of 10."""
    import torch

    assert not packed, "PyTorch's function takes a dense mask, which is another thing"

    def draw(heads):
        return torch.randn(rows, heads, length, head_dim, device="cuda", dtype=getattr(torch, dtype),
                           requires_grad=backward)

    query, key, value, cotangent = (draw(n) for n in (heads, kv_heads, kv_heads, heads))
    seconds = []
    for _ in range(13):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        y = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        if backward:
            torch.autograd.grad(y, (query, key, value), cotangent)
        stop.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(stop) / 1e3)
    return min(seconds[3:])
