"""Attention and SwiGLU, one public function each; usable with nothing but jax."""

from ctllm_jax.kernels import attention as _attention
from ctllm_jax.kernels import swiglu as _swiglu

__all__ = ["attention", "implementations", "sharded_swiglu", "swiglu"]

_rooms = {"attention": _attention, "swiglu": _swiglu}
attention = _attention.attention
swiglu = _swiglu.swiglu
sharded_swiglu = _swiglu.sharded_swiglu


def implementations(**named: str) -> dict[str, str]:
    """Op -> the implementation that runs here; `named` as of each op's `implementation=`, "auto" where it is left out.

    Raises:
      ValueError: a named one cannot run here.
    """
    return {op: room.chosen(named.get(op, "auto")) for op, room in _rooms.items()}
