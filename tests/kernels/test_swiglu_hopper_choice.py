"""Where Hopper's SwiGLU is taken: where it is named, and by "auto" once it was measured."""

import types

import pytest

from ctllm_jax.kernels.swiglu import MEASURED, chosen, shape_class

H100 = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", platform="gpu")
SHAPE = (8192, 2048, 5504)


def test_auto_takes_it_where_a_measurement_says_so_and_a_name_always(monkeypatch):
    assert chosen(device=H100, shape=SHAPE) == "xla" and chosen("pallas", device=H100, shape=SHAPE) == "pallas"
    monkeypatch.setitem(MEASURED, ("hopper", "bfloat16", shape_class(*SHAPE), True), 1.05)
    assert chosen(device=H100, shape=SHAPE) == "pallas"
    assert chosen(device=H100, shape=SHAPE, recompute=False) == "xla"
    with pytest.raises(ValueError, match="F=5500 are not both multiples of 64; what can: xla"):
        chosen("pallas", device=H100, shape=(8192, 2048, 5500))
