"""Hopper's SwiGLU: the kernel's own source, simulated, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctllm_jax.kernels.swiglu import hopper
from ctllm_jax.kernels.swiglu.hopper import SwigluBlocks
from ctllm_jax.kernels.swiglu.reference import swiglu_reference
from tests.mosaic_simulator import simulated

# (T, D, F, blocks, multiprocessors, recompute): whole and odd tiles, one processor and some, a band that ends early.
CASES = {
    "odd": (205, 192, 320, SwigluBlocks(), 3, True),
    "small": (8, 64, 64, SwigluBlocks(), 132, False),
    "bands": (600, 64, 192, SwigluBlocks(columns=64, stages=2, backward_stages=2, band=2), 4, True),
    "many steps on one processor": (72, 448, 192, SwigluBlocks(groups=3, columns=64, stages=3), 1, False),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_simulated_equals_float32(name, monkeypatch):
    tokens, hidden, ffn, blocks, processors, recompute = CASES[name]
    draws = np.random.default_rng(0)
    x, gate, up, cotangent = (jnp.asarray(draws.standard_normal(shape, np.float32) * size, jnp.bfloat16)
                              for shape, size in (((tokens, hidden), 1), ((hidden, ffn), hidden**-0.5),
                                                  ((hidden, ffn), hidden**-0.5), ((tokens, ffn), 1)))
    exact = [a.astype(jnp.float32) for a in (x, gate, up, cotangent)]
    with simulated(monkeypatch):
        h, pullback = jax.vjp(lambda *inputs: hopper.swiglu_hopper(
            *inputs, recompute=recompute, blocks=blocks, multiprocessors=processors), x, gate, up)
        grads = pullback(cotangent)
    expected, pullback = jax.vjp(swiglu_reference, *exact[:3])
    for ours, theirs in zip((h, *grads), (expected, *pullback(exact[3])), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(np.float32), theirs, atol=0.01 * np.abs(theirs).max())


@pytest.mark.parametrize(("changes", "message"), [
    ({"device_kind": "NVIDIA A100-SXM4-80GB"}, "for Hopper .* this is NVIDIA A100"),
    ({"dtype": "float32"}, "and x is float32"),
    ({"ffn": 5500}, "F=5500 are not both multiples of 64"),
])
def test_what_it_does_not_do_has_a_reason(changes, message):
    asked = {"device_kind": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", "hidden": 2048, "ffn": 5504}
    assert hopper.refusal(**asked) is None
    with pytest.raises(ValueError, match=message):
        raise ValueError(hopper.refusal(**asked | changes))


@pytest.mark.parametrize(("sizes", "message"), [
    ({"columns": 96}, "columns is 96, and must be a positive multiple of 64"),
    ({"columns": 256}, "a tile needs 256 registers .* a thread has 240"),
    ({"groups": 5}, "groups is 5, and must be one of 2, 3"),
    ({"stages": 5}, r"a tile \(product\) needs \d+ bytes of shared memory"),
    ({"backward_stages": 1}, "stages are 1, and must be at least 2"),
])
def test_a_block_size_that_does_not_fit_names_the_limit(sizes, message):
    SwigluBlocks().check()
    with pytest.raises(ValueError, match=message):
        SwigluBlocks(**sizes).check()
