"""Attention and SwiGLU, one public function each; they need only jax."""

from ctllm_jax.kernels import attention as _attention
from ctllm_jax.kernels import swiglu as _swiglu

__all__ = ["attention", "implementations", "sharded_swiglu", "swiglu"]

_rooms = {"attention": _attention, "swiglu": _swiglu}
attention = _attention.attention
swiglu = _swiglu.swiglu
sharded_swiglu = _swiglu.sharded_swiglu


def implementations(**named: str) -> dict[str, str]:
    """Return op -> the implementation that runs here; `named` gives each op's `implementation=`, by default "auto".

    Raises:
      ValueError: a named implementation cannot run here.
    """
    return {op: room.chosen(named.get(op, "auto")) for op, room in _rooms.items()}
