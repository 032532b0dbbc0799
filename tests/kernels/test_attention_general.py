"""Attention with a bias, with keys of another length than the queries, and with a traced scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctllm_jax.kernels.attention import attention
from tests.kernels.test_attention import draw


@pytest.mark.parametrize(("length", "kv_length"), [(1, 9), (40, 23), (300, 70)])
@pytest.mark.parametrize("shape", [(2, 4, True, True), (1, 4, True, True), (2, 1, False, True), (1, 1, True, False)],
                         ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
def test_a_bias_and_keys_of_another_length_equal_jax_nn(length, kv_length, shape, causal):
    batch, heads, by_query, by_key = shape
    query, _, _, direction = draw(length, 4, 2, 8)
    _, key, value, _ = draw(kv_length, 4, 2, 8, seed=1)
    bias = np.random.default_rng(2).standard_normal(
        (batch, heads, length if by_query else 1, kv_length if by_key else 1), np.float32)

    def along(function, **options):
        return jax.value_and_grad(lambda query, key, value, bias: jnp.sum(direction * function(
            query, key, value, bias=bias, **options)), argnums=(0, 1, 2, 3))(query, key, value, bias)

    found, expected = along(attention, causal=causal), along(jax.nn.dot_product_attention, is_causal=causal)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), found, expected)


def test_segments_and_positions_of_keys_of_another_length():
    query, _, _, _ = draw(3, 2, 2, 8)
    _, key, value, _ = draw(5, 2, 2, 8, seed=1)
    ids, kv_ids = np.array([[1, 2, 0]] * 2), np.array([[2, 1, 1, 3, 2]] * 2)
    places, kv_places = np.array([[4, 1, 9]] * 2), np.array([[0, 7, 3, 0, 5]] * 2)
    y, lse = attention(query, key, value, segment_ids=ids, kv_segment_ids=kv_ids, positions=places,
                       kv_positions=kv_places, return_lse=True)
    # Query 0 sees key 2 alone (of segment 1, not behind it), query 1 key 0, and padding nothing.
    np.testing.assert_allclose(y, np.stack([value[:, 2], value[:, 0], np.zeros_like(value[:, 0])], axis=1), rtol=1e-6)
    assert (lse[:, 2] == -1e30).all() and (lse[:, :2] > -1e3).all()


def test_a_query_that_sees_nothing_gives_zeros_and_takes_no_gradient():
    query, key, value, _ = draw(6, 2, 2, 8)
    bias = np.zeros((1, 1, 6, 6), np.float32)
    bias[:, :, 3] = -np.inf
    y = attention(query, key, value, bias=bias)
    assert not y[:, 3].any() and np.all(y[:, 2].any())
    grads = jax.grad(lambda *arrays: jnp.sum(jnp.square(attention(*arrays[:3], bias=arrays[3]))),
                     argnums=(0, 1, 2, 3))(query, key, value, bias)
    assert all(np.all(np.isfinite(grad)) for grad in grads) and not grads[0][:, 3].any()
    # A window that ends before the first of few keys.
    assert not attention(query, key[:, :2], value[:, :2], sliding_window=2)[:, 3:].any()


def test_forward_mode_works_with_a_bias():
    query, key, value, direction = draw(300, 2, 2, 8)
    bias = np.zeros((1, 2, 300, 300), np.float32)
    _, slope = jax.jvp(lambda query: attention(query, key, value, bias=bias), (query,), (direction,))
    _, pull = jax.vjp(lambda query: attention(query, key, value), query)
    np.testing.assert_allclose(jnp.vdot(slope, slope), jnp.vdot(direction, pull(slope)[0]), rtol=1e-4)


@pytest.mark.parametrize(("length", "options"), [(10, {}), (1100, {}), (10, {"bias": np.zeros((1, 1, 1, 1), "f")})])
def test_a_scale_may_be_traced_and_has_a_gradient(length, options):
    query, key, value, direction = draw(length, 2, 2, 8)

    def along(scale):
        return jnp.sum(direction * attention(query, key, value, scale=scale, **options))

    slope = jax.jit(jax.grad(along))(0.3)
    assert jax.jit(along)(0.3) == pytest.approx(float(along(0.3)), rel=1e-4)
    assert slope == pytest.approx(float(along(0.301) - along(0.299)) / 0.002, rel=2e-2, abs=1e-2)


@pytest.mark.parametrize(("changes", "message"), [
    ({"bias": np.zeros((2, 4, 10, 9), np.float32)}, r"bias \(2, 4, 10, 9\) of float32 must be floating, and"),
    ({"bias": np.zeros((1, 1, 1, 1), int)}, "of int64 must be floating"),
    ({"bias": np.zeros((1, 1, 1, 1), np.float32), "implementation": "pallas"}, "'pallas' takes no bias"),
    ({"kv_segment_ids": np.ones((2, 10), int)}, "segment_ids and kv_segment_ids belong together")])
def test_what_does_not_fit_is_named(changes, message):
    query, key, value, _ = draw(10, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        attention(query, key, value, **changes)
