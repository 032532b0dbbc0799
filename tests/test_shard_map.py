"""Public functions inside of a user's `shard_map` with JAX's default check of what varies: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ctllm_jax.kernels import attention, swiglu
from ctllm_jax.kernels.attention.xla import UNROLLED
from ctllm_jax.losses.cross_entropy import chunked_cross_entropy
from ctllm_jax.losses.preference import Answers, pair_logps, preference_loss, sequence_logps

ROWS, HEADS, WIDTH, VOCABULARY = 4, 4, 16, 50


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def assert_splits(function, arrays, specs, out):
    """`function` gives the same on parts of its arrays as on the whole; so do the gradients of a sum of squares."""
    mesh = jax.make_mesh((ROWS, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    split = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out)
    floating = [index for index, array in enumerate(arrays) if jnp.issubdtype(array.dtype, jnp.floating)]
    found, expected = (jax.jit(jax.value_and_grad(
        lambda *arrays, function=function: jnp.sum(jnp.square(function(*arrays))), floating))(*arrays)
        for function in (split, function))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * max(10, abs(y).max())), found,
                 expected)


@pytest.mark.parametrize("length", [96, UNROLLED + 76])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"sliding_window": 300}], ids=str)
def test_attention_with_heads_and_rows_split(length, options):
    def attend(query, key, value, segment_ids):
        y, lse = attention(query, key, value, segment_ids=segment_ids, return_lse=True, **options)
        return y + jnp.where(segment_ids > 0, 1, 0)[:, :, None, None] * lse[..., None]

    arrays = [normal(ROWS, length, HEADS, 8, seed=seed) for seed in range(3)]
    segment_ids = jnp.ones((ROWS, length), jnp.int32).at[:, length // 3:].set(2)
    heads = P("data", None, "tensor")
    assert_splits(attend, [*arrays, segment_ids], (heads, heads, heads, P("data")), heads)


@pytest.mark.parametrize("length", [96, UNROLLED + 76])
def test_attention_to_keys_that_all_devices_share(length):
    def attend(query, key):
        key = jnp.broadcast_to(key, query.shape)
        return attention(query, key, key)

    assert_splits(attend, [normal(ROWS, length, 2, 8), normal(1, length, 2, 8, seed=1)], (P("data"), P()), P("data"))


@pytest.mark.parametrize("length", [96, 300])
def test_attention_with_a_bias_that_all_devices_share(length):
    arrays = [normal(ROWS, length, 2, 8), normal(ROWS, 70, 2, 8, seed=1), normal(1, 2, length, 70, seed=2)]
    assert_splits(lambda query, key, bias: attention(query, key, key, bias=bias, causal=False), arrays,
                  (P("data"), P("data"), P()), P("data"))


@pytest.mark.parametrize("chunk_size", [5, 100], ids=["chunks", "one chunk"])
def test_cross_entropy_with_a_head_that_all_devices_share(chunk_size):
    def loss(hidden, head, targets):
        loss, _, _ = chunked_cross_entropy(hidden, head, targets, jnp.ones(targets.shape), z_loss=1e-2,
                                           chunk_size=chunk_size)
        return loss[None]

    def summed(hidden, head, targets):  # as a user adds up the parts; on the whole batch there is one part
        parts = loss(hidden, head, targets)
        return jax.lax.psum(parts, "data") if hidden.shape[0] < ROWS else parts

    targets = jnp.arange(ROWS * 24).reshape(ROWS, 24) % VOCABULARY
    assert_splits(summed, [normal(ROWS, 24, WIDTH), normal(WIDTH, VOCABULARY), targets], (P("data"), P(), P("data")),
                  P())


@pytest.mark.parametrize("chunk_size", [5, 100], ids=["chunks", "one chunk"])
def test_dpo_with_a_head_that_all_devices_share(chunk_size):
    def losses(hidden, head, targets):
        rows = hidden.shape[0]
        segment_ids = jnp.tile(jnp.array([[1] * 12 + [2] * 12]), (rows, 1))
        logps, lengths = sequence_logps(hidden, head, targets, jnp.ones(targets.shape), segment_ids, num_segments=2,
                                        chunk_size=chunk_size)
        chosen, rejected, weights = pair_logps(Answers(logps, lengths, jnp.zeros_like(logps)),
                                               jnp.ones((rows, 2), jnp.int32), jnp.tile(jnp.array([True, False]),
                                                                                        (rows, 1)))
        one = jax.vmap(lambda *pair: preference_loss(*pair[:2], kind="sigmoid", beta=0.1, weights=pair[2])[0])
        return one(chosen, rejected, weights)

    targets = jnp.arange(ROWS * 24).reshape(ROWS, 24) % VOCABULARY
    assert_splits(losses, [normal(ROWS, 24, WIDTH), normal(WIDTH, VOCABULARY), targets], (P("data"), P(), P("data")),
                  P("data"))


def test_swiglu_with_weights_split_or_shared():
    x, gate, up = normal(ROWS, 24, WIDTH), normal(WIDTH, 12, seed=1), normal(WIDTH, 12, seed=2)
    assert_splits(swiglu, [x, gate, up], (P("data"), P(None, "tensor"), P(None, "tensor")), P("data", None, "tensor"))
    assert_splits(lambda x, gate: swiglu(x, gate, jnp.ones_like(gate)), [x, gate], (P(), P(None, "tensor")),
                  P(None, None, "tensor"))
