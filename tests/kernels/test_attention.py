"""Attention against float64 on packed batches, gradients too; what it never sees, never holds, never computes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from ctllm_jax import kernels
from ctllm_jax.kernels.attention import attention, cached_attention
from ctllm_jax.kernels.attention.host import attention_float64 as attention_host
from ctllm_jax.kernels.attention.reference import attention_reference

# (S, N, K, H, window): one block and several, whole and odd, and one long enough to compute probabilities twice.
SHAPES = [(1, 2, 2, 4, None), (7, 4, 2, 6, None), (128, 2, 1, 8, None), (129, 4, 4, 8, None), (300, 4, 2, 16, None),
          (60, 4, 2, 8, 1), (300, 2, 1, 8, 5), (300, 2, 2, 8, 150), (1100, 2, 1, 8, None), (1100, 2, 1, 8, 70)]


def draw(length, heads, kv_heads, head_dim, *, rows=2, seed=0):
    """Query, key, value, and a direction to differentiate along: normal, float32."""
    draws = np.random.default_rng(seed)
    return [draws.standard_normal((rows, length, n, head_dim), np.float32) for n in (heads, kv_heads, kv_heads, heads)]


def segments_of(length, *, rows=2):
    """Documents of different lengths in each row, and padding: at the end of all rows, and inside of the first."""
    ids = np.stack([np.searchsorted(np.cumsum([3 + row, 40, 11, 200, 500]), np.arange(length), side="right") + 1
                    for row in range(rows)]).astype(np.int32)
    ids[:, length - length // 8:] = 0
    ids[0, 5:7] = 0
    return ids


def attention_float64(query, key, value, segments, window):
    """One query at a time, in numpy."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    output = np.zeros(query.shape)
    rows, length, heads, head_dim = query.shape
    for b in range(rows):
        for s in range(length):
            seen = np.arange(0 if window is None else max(0, s - window + 1), s + 1)
            if segments is not None:
                seen = seen[(segments[b, seen] == segments[b, s]) & (segments[b, s] > 0)]
            if not seen.size:
                continue
            for n in range(heads):
                k = n * key.shape[2] // heads
                scores = key[b, seen, k] @ query[b, s, n] / np.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                output[b, s, n] = weights @ value[b, seen, k] / weights.sum()
    return output


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_equals_float64(shape, packed):
    *sizes, window = shape
    query, key, value, _ = draw(*sizes)
    segments = segments_of(sizes[0]) if packed else None
    expected = attention_float64(query, key, value, segments, window)
    for function in (attention, attention_reference):
        output = jax.jit(partial(function, sliding_window=window))(query, key, value, segment_ids=segments)
        np.testing.assert_allclose(output, expected, atol=2e-6)


def gradients(function, query, key, value, direction, **options):
    """d sum(output · direction) / d (query, key, value)."""
    return jax.jit(jax.grad(lambda *inputs: jnp.sum(function(*inputs, **options) * direction), argnums=(0, 1, 2)))(
        query, key, value)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_equal_those_of_the_dense_reference(shape, packed):
    *sizes, window = shape
    inputs = draw(*sizes, seed=1)
    options = {"segment_ids": segments_of(sizes[0]) if packed else None, "sliding_window": window}
    for ours, dense in zip(gradients(attention, *inputs, **options), gradients(attention_reference, *inputs, **options),
                           strict=True):
        np.testing.assert_allclose(ours, dense, atol=5e-6)


def test_gradients_equal_finite_differences_in_float64():
    *inputs, direction = draw(40, 4, 2, 8, seed=2)
    segments = segments_of(40)
    slopes = gradients(attention, *inputs, direction, segment_ids=segments)
    for place, slope in enumerate(slopes):
        way = np.random.default_rng(place).standard_normal(inputs[place].shape)
        ends = []
        for sign in (1, -1):
            moved = [np.asarray(x, np.float64) + (sign * 1e-4 * way if i == place else 0) for i, x in enumerate(inputs)]
            ends.append(np.sum(attention_float64(*moved, segments, None) * direction))
        assert np.sum(slope * way) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_equals_pytorch(kv_heads):
    import torch

    length = 160
    *inputs, direction = draw(length, 4, kv_heads, 8, seed=3)
    segments = segments_of(length)
    place = np.arange(length)
    mask = (place[None, :] <= place[:, None]) & (segments[:, :, None] == segments[:, None, :])
    leaves = [torch.tensor(x, requires_grad=True) for x in inputs]
    query, key, value = (x.transpose(1, 2) for x in leaves)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=torch.tensor(mask)[:, None], enable_gqa=True).transpose(1, 2)
    theirs = theirs * torch.tensor(segments > 0)[:, :, None, None]
    (theirs * torch.tensor(direction)).sum().backward()
    np.testing.assert_allclose(attention(*inputs, segment_ids=segments), theirs.detach(), atol=2e-6)
    for ours, leaf in zip(gradients(attention, *inputs, direction, segment_ids=segments), leaves, strict=True):
        np.testing.assert_allclose(ours, leaf.grad, atol=5e-6)


@pytest.mark.parametrize("length", [300, 1100])
def test_a_document_feels_no_other(length):
    """Bit for bit, by what changes and by gradient."""
    *inputs, direction = draw(length, 4, 2, 8, seed=4)
    segments = np.where(np.arange(length) < 140, 1, 2).astype(np.int32)[None].repeat(2, axis=0)
    first = (segments == 1)[:, :, None, None]
    function = jax.jit(attention)
    before = function(*inputs, segment_ids=segments)
    after = function(*(np.where(first, 50 * x + 1, x) for x in inputs), segment_ids=segments)
    assert np.array_equal(before[:, 140:], after[:, 140:])
    assert not np.array_equal(before[:, :140], after[:, :140])
    for slope in gradients(attention, *inputs, np.where(first, 0, direction), segment_ids=segments):
        assert np.all(slope[:, :140] == 0) and np.any(slope[:, 140:] != 0)


def test_a_query_feels_no_later_key():
    *inputs, direction = draw(200, 4, 2, 8, seed=5)
    function = jax.jit(attention)
    before = function(*inputs)
    for moved in (130, 150, 199):  # at a block's start, inside, and the very last
        later = (np.arange(200) >= moved)[None, :, None, None]
        after = function(*(np.where(later, 50 * x + 1, x) for x in inputs))
        assert np.array_equal(before[:, :moved], after[:, :moved])
        _, *slopes = gradients(attention, *inputs, np.where(later, 0, direction))
        assert all(np.all(slope[:, moved:] == 0) for slope in slopes)


def test_padding_gives_zeros_and_takes_no_gradient():
    *inputs, direction = draw(140, 4, 2, 8, seed=6)
    segments = segments_of(140)
    segments[1] = 0  # a row of nothing but padding
    real = segments > 0
    output = attention(*inputs, segment_ids=segments)
    assert np.all(np.asarray(output)[~real] == 0) and np.all(np.any(output != 0, axis=(2, 3))[real])
    slopes = gradients(attention, *inputs, direction, segment_ids=segments)
    quiet = gradients(attention, *inputs, direction * real[:, :, None, None], segment_ids=segments)
    for slope, other in zip(slopes, quiet, strict=True):
        assert np.all(np.isfinite(slope)) and np.all(np.asarray(slope)[~real] == 0)
        assert np.array_equal(slope, other)


def test_large_scores_stay_finite():
    query, key, value, direction = draw(150, 2, 1, 8, seed=7)
    output = attention(1e4 * query, key, value)
    np.testing.assert_allclose(output, attention_float64(1e4 * query, key, value, None, None), atol=1e-3)
    assert all(np.all(np.isfinite(slope)) for slope in gradients(attention, 1e4 * query, key, value, direction))


@pytest.mark.parametrize("length", [150, 1100])
def test_bfloat16_is_close_and_stays_bfloat16(length):
    *inputs, direction = (jnp.asarray(x, jnp.bfloat16) for x in draw(length, 4, 2, 16, seed=8))
    segments = segments_of(length)
    exact = [x.astype(jnp.float32) for x in inputs]
    output = attention(*inputs, segment_ids=segments)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(output.astype(np.float32), attention_reference(*exact, segment_ids=segments), atol=0.02)
    for ours, dense in zip(gradients(attention, *inputs, direction, segment_ids=segments),
                           gradients(attention_reference, *exact, direction.astype(jnp.float32), segment_ids=segments),
                           strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(np.float32), dense, atol=0.02 * np.abs(dense).max())


def test_scale_and_both_directions():
    query, key, value, _ = draw(140, 2, 1, 4, seed=9)
    segments = segments_of(140)
    for options in ({"scale": 0.1}, {"causal": False}, {"causal": False, "segment_ids": segments}):
        np.testing.assert_allclose(attention(query, key, value, **options),
                                   attention_reference(query, key, value, **options), atol=2e-6)


@pytest.mark.parametrize(("length", "options"), [
    (140, {}), (300, {"sliding_window": 40}), (1100, {}), (1100, {"sliding_window": 70})])
def test_positions_and_log_sum_exp_with_their_gradients(length, options):
    """Tokens in any order, against float64 on the host; both outputs differentiated."""
    *inputs, direction = draw(length, 2, 1, 8, seed=13)
    random = np.random.default_rng(13)
    ids = {"segment_ids": segments_of(length),
           "positions": np.stack([random.permutation(length) for _ in range(2)]).astype(np.int32)}
    lse_direction = np.where(ids["segment_ids"][..., None] > 0, random.standard_normal((2, length, 2)), 0)
    (y, lse), pullback = jax.vjp(
        jax.jit(partial(attention, return_lse=True, **ids, **options)), *map(jnp.asarray, inputs))
    exact = attention_host(*inputs, direction, lse_cotangent=lse_direction, **ids, **options)
    np.testing.assert_allclose(y, exact.y, atol=2e-6)
    np.testing.assert_allclose(lse, exact.lse, rtol=2e-6, atol=2e-6)
    slopes = pullback((jnp.asarray(direction), jnp.asarray(lse_direction, jnp.float32)))
    for ours, theirs in zip(slopes, exact[2:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_positions_that_count_up_say_nothing_new():
    query, key, value, _ = draw(200, 2, 1, 8, seed=14)
    segments = np.repeat([1, 2], 100)[None].repeat(2, axis=0).astype(np.int32)
    positions = np.tile(np.arange(100, dtype=np.int32), 2)[None].repeat(2, axis=0)
    np.testing.assert_allclose(attention(query, key, value, segment_ids=segments, positions=positions),
                               attention(query, key, value, segment_ids=segments), atol=1e-6)


def test_the_host_agrees_with_the_function_it_is_not():
    *inputs, direction = draw(60, 4, 2, 8, seed=15)
    segments = segments_of(60)
    exact = attention_host(*inputs, direction, segment_ids=segments, sliding_window=9)
    np.testing.assert_allclose(exact.y, attention_float64(*inputs, segments, 9), atol=1e-12)
    dense = gradients(attention_reference, *inputs, direction, segment_ids=segments, sliding_window=9)
    for host, other in zip(exact[2:], dense, strict=True):
        np.testing.assert_allclose(host, other, atol=5e-6)


def test_vmap_is_a_loop():
    inputs = [np.stack(pair) for pair in zip(draw(140, 2, 1, 4, seed=10), draw(140, 2, 1, 4, seed=11), strict=True)]
    segments = np.stack([segments_of(140), np.ones((2, 140), np.int32)])
    together = jax.vmap(lambda *x: gradients(attention, *x[:4], segment_ids=x[4]))(*inputs, segments)
    for i in range(2):
        apart = gradients(attention, *(x[i] for x in inputs), segment_ids=segments[i])
        for ours, alone in zip(together, apart, strict=True):
            np.testing.assert_allclose(ours[i], alone, atol=1e-6)


def compile_gradients(length, *, causal=True, window=None, segments=True):
    shapes = [jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (2, 1, 1)]
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(query, key, value, ids):
        return jnp.sum(jnp.square(attention(query, key, value, causal=causal, sliding_window=window,
                                            segment_ids=ids if segments else None)))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes, ids).compile()


def test_long_sequences_hold_no_square():
    """By the memory of the compiled gradient: less than a quarter of one head's scores at 4,096."""
    held = compile_gradients(4096).memory_analysis().temp_size_in_bytes
    assert held < 2 * 4096**2 * 4 / 4, held / 2**20


def test_what_is_masked_is_not_computed():
    """By the operations that the compiler counts."""
    flops = {name: compile_gradients(1024, causal=causal, window=window).cost_analysis()["flops"]
             for name, causal, window in (("all", False, None), ("causal", True, None), ("window", True, 128))}
    assert flops["causal"] < 0.6 * flops["all"]
    assert flops["window"] < 0.5 * flops["causal"]


def test_no_segments_no_comparison():
    assert "s32[1,2048]" in compile_gradients(2048).as_text()
    text = compile_gradients(2048, segments=False).as_text()
    assert text.count("s32[1,2048]") <= 2  # the argument that nothing reads


@pytest.mark.parametrize("window", [None, 6])
def test_cached_attention_is_the_last_rows_of_the_full_one(window):
    """Rows of different lengths in one cache whose free slots hold rubbish."""
    query, key, value, _ = draw(40, 4, 2, 8, seed=12)
    full = attention(query, key, value, sliding_window=window)
    positions = np.array([[20, 21, 22], [6, 7, 8]], np.int32)
    written = (np.arange(50)[None] <= positions[:, -1:])[:, :, None, None]
    room = [(0, 0), (0, 10), (0, 0), (0, 0)]
    cache = [np.moveaxis(np.where(written, np.pad(x, room), 1e6).astype(np.float32), 1, 2) for x in (key, value)]
    new = np.take_along_axis(query, positions[:, :, None, None], axis=1)
    output = jax.jit(partial(cached_attention, sliding_window=window))(new, *cache, query_positions=positions)
    for row in range(2):
        np.testing.assert_allclose(output[row], full[row, positions[row]], atol=2e-6)
    bfloat16 = cached_attention(*(jnp.asarray(x, jnp.bfloat16) for x in (new, *cache)), query_positions=positions)
    assert bfloat16.dtype == jnp.bfloat16


@pytest.mark.parametrize(("changes", "message"), [
    ({"implementation": "pallas"}, r"'pallas' cannot run on cpu: .*what can: .*xla"),
    ({"implementation": "cudnn"}, r"'cudnn' cannot run on cpu: .*what can: .*xla"),
    ({"implementation": "fast"}, "must be one of auto, pallas, cudnn, xla"),
    ({"sliding_window": 4, "causal": False}, "sliding_window=4 needs causal=True"),
    ({"positions": np.ones((2, 10), np.int32), "causal": False}, "positions need causal=True"),
    ({"positions": np.ones((2, 9), np.int32)}, r"positions \(2, 9\) must be \(2, 10\)"),
    ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
    ({"segment_ids": np.ones((2, 9), np.int32)}, r"segment_ids \(2, 9\) must be \(2, 10\)"),
])
def test_what_cannot_run_says_why(changes, message):
    query, key, value, _ = draw(10, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        attention(query, key, value, **changes)


def test_shapes_that_do_not_fit_are_named():
    query, key, value, _ = draw(10, 4, 2, 8)
    with pytest.raises(ValueError, match="2 key and value heads must divide 3 query heads"):
        attention(query[:, :, :3], key, value)
    with pytest.raises(ValueError, match=r"must both be \[2, 10, K, 8\]"):
        attention(query, key, value[:, :9])


@pytest.mark.parametrize(("rows", "length"), [(0, 7), (2, 0), (0, 0)])
def test_no_tokens_give_no_tokens(rows, length):
    query, key, value, _ = draw(length, 4, 2, 8, rows=rows)
    segments = np.ones((rows, length), np.int32)
    for function in (attention, jax.jit(attention)):
        assert function(query, key, value, segment_ids=segments).shape == (rows, length, 4, 8)
    y, lse = attention(*(jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)), return_lse=True)
    assert y.dtype == jnp.bfloat16 and lse.shape == (rows, length, 4) and lse.dtype == jnp.float32
    grads = jax.grad(lambda *arrays: jnp.sum(attention(*arrays)), argnums=(0, 1, 2))(query, key, value)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]
    cache = [np.zeros((rows, 2, 9, 8), np.float32)] * 2
    assert cached_attention(query, *cache, query_positions=segments).shape == query.shape


def test_dtypes_dims_and_axes_that_do_not_fit_are_named():
    query, key, value, _ = draw(10, 4, 2, 8)
    ids, cache = np.ones((2, 10), np.int32), [np.zeros((2, 2, 9, 8), np.float32)] * 2
    whole, only_data = query.astype(np.int32), jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    for arrays, options, message in (
            ((whole, key, value), {}, "query is int32 and must be float32 or bfloat16"),
            ((query, key, value.astype(np.int8)), {}, "value is int8"),
            ((query > 0, key, value), {}, "query is bool"),
            ((query[0], key, value), {}, r"query \(10, 4, 8\) must have four dims"),
            ((query, key[0], value[0]), {}, r"key \(10, 2, 8\) must have four dims"),
            ((query[:, :, :0], key, value), {}, "at least one head"),
            ((query, key[:, :, :0], value), {}, "at least one head"),
            ((query[..., :0], key[..., :0], value[..., :0]), {}, "at least one head, and its dim be at least 1"),
            ((query, key, value), {"segment_ids": ids.astype(np.float32)}, "segment_ids is float32 and must be"),
            ((query, key, value), {"positions": ids > 0}, "positions is bool and must be integers"),
            ((query, key, value), {"mesh": only_data}, "the mesh has the axes data, fsdp, and no tensor"),
            ((query, key, value), {"mesh": only_data, "tensor_axis": None, "batch_axes": ("rows",)}, "and no rows")):
        with pytest.raises(ValueError, match=message):
            attention(*arrays, **options)
    np.testing.assert_array_equal(attention(query, key, value, mesh=only_data, tensor_axis=None),
                                  attention(query, key, value))
    for new, positions in ((whole, ids), (query[0], ids), (query[:1], ids), (query[:, :, :3], ids), (query, ids[:1])):
        with pytest.raises(ValueError, match="cached attention"):
            cached_attention(new, *cache, query_positions=positions)


def test_the_room_gives_functions_and_says_what_runs():
    assert kernels.attention is attention
    assert kernels.implementations() == {"attention": "xla", "swiglu": "xla"}
    assert kernels.implementations(attention="xla", swiglu="auto") == {"attention": "xla", "swiglu": "xla"}
    with pytest.raises(ValueError, match="swiglu: implementation='cudnn'"):
        kernels.implementations(swiglu="cudnn")
