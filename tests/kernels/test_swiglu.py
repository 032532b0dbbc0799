"""SwiGLU against float64 and PyTorch, and what its backward pass keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from ctllm_jax.kernels import sharded_swiglu, swiglu
from ctllm_jax.kernels.swiglu.reference import swiglu_reference


def draw(shape=(2, 9), hidden=24, ffn=40, seed=0):
    """x, gate, up, and a direction to differentiate along: float32."""
    draws = np.random.default_rng(seed)
    return [draws.standard_normal(size, np.float32) for size in
            ((*shape, hidden), (hidden, ffn), (hidden, ffn), (*shape, ffn))]


def swiglu_float64(x, gate, up):
    x, gate, up = (np.asarray(part, np.float64) for part in (x, gate, up))
    gated = x @ gate
    return gated / (1 + np.exp(-gated)) * (x @ up)


def gradients(function, x, gate, up, direction):
    return jax.jit(jax.grad(lambda *inputs: jnp.sum(function(*inputs) * direction), argnums=(0, 1, 2)))(x, gate, up)


@pytest.mark.parametrize("shape", [(9,), (2, 9), (2, 3, 5)], ids=str)
def test_forward_equals_float64(shape):
    inputs = draw(shape)[:3]
    for function in (swiglu, swiglu_reference):
        np.testing.assert_allclose(jax.jit(function)(*inputs), swiglu_float64(*inputs), rtol=1e-5, atol=2e-5)


def test_gradients_equal_finite_differences_in_float64():
    *inputs, direction = draw(seed=1)
    for place, slope in enumerate(gradients(swiglu, *inputs, direction)):
        way = np.random.default_rng(place).standard_normal(inputs[place].shape)
        ends = [np.sum(swiglu_float64(*(np.asarray(x, np.float64) + (sign * 1e-4 * way if i == place else 0)
                                        for i, x in enumerate(inputs))) * direction) for sign in (1, -1)]
        assert np.sum(slope * way) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-4)


@pytest.mark.parity
def test_equals_pytorch():
    import torch

    *inputs, direction = draw(seed=2)
    leaves = [torch.tensor(x, requires_grad=True) for x in inputs]
    theirs = torch.nn.functional.silu(leaves[0] @ leaves[1]) * (leaves[0] @ leaves[2])
    (theirs * torch.tensor(direction)).sum().backward()
    np.testing.assert_allclose(swiglu(*inputs), theirs.detach(), rtol=1e-5, atol=2e-5)
    for ours, leaf in zip(gradients(swiglu, *inputs, direction), leaves, strict=True):
        np.testing.assert_allclose(ours, leaf.grad, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close_and_stays_bfloat16():
    *inputs, direction = (jnp.asarray(x, jnp.bfloat16) for x in draw(seed=3))
    exact = [x.astype(jnp.float32) for x in (*inputs, direction)]
    output = swiglu(*inputs)
    assert output.dtype == jnp.bfloat16
    expected = swiglu_reference(*exact[:3])
    np.testing.assert_allclose(output.astype(np.float32), expected, atol=0.02 * np.abs(expected).max())
    for ours, plain in zip(gradients(swiglu, *inputs, direction), gradients(swiglu_reference, *exact), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(np.float32), plain, atol=0.02 * np.abs(plain).max())


def test_large_gates_stay_finite():
    x, gate, up, direction = draw(seed=4)
    for factor in (-1e4, 1e4):
        assert np.all(np.isfinite(swiglu(factor * x, gate, up)))
        assert all(np.all(np.isfinite(slope)) for slope in gradients(swiglu, factor * x, gate, up, direction))


def test_the_backward_pass_keeps_two_wide_arrays():
    """Gate and up, in the activations' dtype; plain differentiation keeps five, in float32."""
    *inputs, _ = (jnp.asarray(x, jnp.bfloat16) for x in draw((64,), 16, 256))
    _, pullback = jax.vjp(swiglu, *inputs)
    wide = [x for x in jax.tree.leaves(pullback) if x.shape == (64, 256)]
    assert len(wide) == 2 and all(x.dtype == jnp.bfloat16 for x in wide)


def test_vmap_is_a_loop():
    x, gate, up, _ = draw()
    mapped = jax.vmap(swiglu, in_axes=(0, None, None))(x, gate, up)
    np.testing.assert_allclose(mapped, swiglu(x, gate, up), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pallas", "cudnn"])
def test_what_cannot_run_says_why(name):
    with pytest.raises(ValueError, match=f"swiglu: implementation='{name}' cannot run on cpu: .*what can: xla"):
        swiglu(*draw()[:3], implementation=name)


def test_shapes_that_do_not_fit_are_named():
    x, gate, up, _ = draw()
    with pytest.raises(ValueError, match=r"gate \(24, 40\) and up \(24, 39\) must both be \[24, F\]"):
        swiglu(x, gate, up[:, :39])


@pytest.mark.parametrize("shape", [(0, 9), (2, 0), (0,), ()])
def test_no_tokens_give_no_tokens(shape):
    x, gate, up, direction = draw(shape)
    assert swiglu(x, gate, up).shape == jax.jit(swiglu)(x, gate, up).shape == (*shape, 40)
    grads = gradients(swiglu, x, gate, up, direction)
    assert [grad.shape for grad in grads] == [x.shape, gate.shape, up.shape]
    assert x.size or not np.any(grads[1])
    no_hidden = swiglu(np.zeros((3, 0), np.float32), gate[:0], up[:0])
    np.testing.assert_array_equal(no_hidden, np.zeros((3, 40)))
    assert swiglu(x, gate[:, :0], up[:, :0]).shape == (*shape, 0)


def test_dtypes_dims_and_axes_that_do_not_fit_are_named():
    x, gate, up, _ = draw()
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    for arrays, message in (((x.astype(np.int32), gate, up), "x is int32 and must be float32 or bfloat16"),
                            ((x, gate.astype(np.int8), up), "gate is int8"), ((x, gate, up > 0), "up is bool"),
                            ((x[0, 0, 0], gate, up), "x must have at least one dim"),
                            ((x, gate[0], up[0]), "must both be")):
        with pytest.raises(ValueError, match=message):
            swiglu(*arrays)
        with pytest.raises(ValueError, match=message):
            sharded_swiglu(*arrays, mesh=mesh, batch_axes=("data",), weight_axis="fsdp", tensor_axis="fsdp")
    with pytest.raises(ValueError, match="the mesh has the axes data, fsdp, and no tensor"):
        sharded_swiglu(x, gate, up, mesh=mesh, batch_axes=("data", "fsdp"), weight_axis="fsdp", tensor_axis="tensor")
