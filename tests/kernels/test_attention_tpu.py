"""The TPU kernels in interpret mode: memory is NaN until it is written, and a read out of bounds raises."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from ctllm_jax.kernels.attention import attention, chosen, make_request, tpu, tpu_forward
from ctllm_jax.kernels.attention.cases import draw_inputs, largest_errors
from ctllm_jax.kernels.attention.fused import Kernels, fused_attention
from ctllm_jax.kernels.attention.host import attention_float64
from ctllm_jax.kernels.attention.tpu_blocks import Blocks

attention_room = importlib.import_module("ctllm_jax.kernels.attention")

SMALL = Blocks(128, 128, 256, 128, 128, 256)
STRICT = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")

# (S, N, K, H, dtype, packed, options): odd lengths and whole, one block and several parts of keys, groups.
GRID = [
    (300, 4, 2, 64, "float32", True, {}),
    (257, 2, 2, 128, "bfloat16", True, {}),
    (600, 2, 1, 64, "bfloat16", True, {}),
    (1, 1, 1, 64, "float32", False, {}),
    (400, 1, 1, 64, "float32", True, {"sliding_window": 70}),
    (300, 2, 1, 64, "float32", True, {"positions": True}),
]
MORE = [
    (300, 2, 2, 64, "float32", False, {"causal": False}),
    (130, 2, 1, 64, "float32", False, {}),
    (128, 1, 1, 64, "float32", True, {}),
    (512, 2, 2, 128, "float32", True, {}),
    (513, 8, 1, 64, "bfloat16", True, {}),
    (1024, 2, 2, 64, "bfloat16", False, {}),
    (300, 2, 1, 256, "float32", True, {"causal": False}),
    (777, 2, 2, 64, "float32", True, {"sliding_window": 1}),
    (300, 2, 2, 64, "float32", False, {"positions": True, "sliding_window": 33}),
    (2, 2, 2, 64, "bfloat16", True, {"scale": -0.3}),
]


def kernels(blocks=SMALL, interpret=STRICT):
    return Kernels(partial(tpu.forward, blocks=blocks, interpret=interpret),
                   partial(tpu.backward, blocks=blocks, interpret=interpret))


def request_of(query, key, ids, **options):
    return make_request(length=query.shape[1], heads=query.shape[2], kv_heads=key.shape[2], head_dim=query.shape[3],
                        dtype=query.dtype.name, segments="segment_ids" in ids, positions="positions" in ids,
                        **options)._replace(platform="tpu", device_kind="TPU v5 lite")


def make_function(query, key, ids, *, using=None, **options):
    """(y, lse) of query, key, value and ids; `ids` only says which are given."""
    using, request = using or kernels(), request_of(query, key, ids, **options)

    def function(query, key, value, ids):
        return fused_attention(using, query, key, value, segment_ids=ids.get("segment_ids"),
                               positions=ids.get("positions"), request=request)

    return function


def with_gradients(function):
    """`(query, key, value, cotangent, ids) -> (y, lse, dq, dk, dv)`, compiled."""
    @jax.jit
    def both(query, key, value, cotangent, ids):
        y, pullback, lse = jax.vjp(lambda *inputs: function(*inputs, ids), query, key, value, has_aux=True)
        return y, lse.swapaxes(1, 2), *pullback(cotangent)
    return both


@pytest.mark.parametrize("case", [*GRID, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids=str)
def test_both_passes_equal_float64(case):
    *sizes, dtype, packed, options = case
    options = dict(options)
    inputs, ids = draw_inputs(*sizes, dtype=dtype, packed=packed, positions=options.pop("positions", False))
    results = with_gradients(make_function(*inputs[:2], ids, **options))(*inputs, ids)
    exact = attention_float64(*(x.astype(jnp.float32) for x in inputs), **ids, **options)
    for ours, given in zip((results[0], *results[2:]), (inputs[0], *inputs[:3]), strict=True):
        assert ours.dtype == given.dtype and ours.shape == given.shape
    for what, (error, tolerance) in largest_errors(results, exact, dtype=dtype).items():
        assert error <= tolerance, (what, error)


def test_documents_are_isolated_and_padding_is_zero():
    """Bit for bit, forward and backward, over three parts of keys; document 2 begins inside of a block."""
    length, border, end = 384, 130, 350
    inputs, _ = draw_inputs(length, 1, 1, 64, dtype="float32", packed=False, rows=1)
    place = np.arange(length)
    ids = {"segment_ids": jnp.asarray(np.where(place < border, 1, np.where(place < end, 2, 0))[None], jnp.int32)}
    blocks = Blocks(128, 128, 128, 128, 128, 128)
    function = with_gradients(make_function(*inputs[:2], ids, using=kernels(blocks)))
    first = (place < border)[None, :, None, None]
    before = function(*inputs, ids)
    after = function(*(jnp.where(first, 50 * x + 1, x) for x in inputs), ids)
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old[:, border:], new[:, border:])
        assert not np.array_equal(old[:, :border], new[:, :border])
    y, lse, *grads = before
    assert np.all(lse[:, end:] == np.float32(-1e30))
    assert all(np.all(x[:, end:] == 0) and np.all(np.isfinite(x)) for x in (y, *grads))
    # Nor does what stands in padding, or comes back for it, reach anything.
    padding = (place >= end)[None, :, None, None]
    for old, new in zip(before, function(*(jnp.where(padding, 7e4, x) for x in inputs), ids), strict=True):
        assert np.array_equal(old, new)


def test_log_sum_exp_has_a_gradient():
    inputs, ids = draw_inputs(130, 2, 1, 64, dtype="float32", packed=True, rows=1)
    cotangent = np.random.default_rng(1).standard_normal((1, 130, 2)).astype(np.float32)
    function = make_function(*inputs[:2], ids)
    grads = jax.jit(lambda *x: jax.vjp(lambda *y: function(*y, ids), *x[:3])[1]((x[3], x[4].swapaxes(1, 2))))(
        *inputs, cotangent)
    exact = attention_float64(*inputs, **ids, lse_cotangent=np.where(ids["segment_ids"][..., None] > 0, cotangent, 0))
    for ours, theirs in zip(grads, exact[2:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_no_race_is_found():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    inputs, ids = draw_inputs(300, 2, 1, 64, dtype="float32", packed=True, rows=1)
    using = kernels(interpret=pltpu.InterpretParams(detect_races=True))
    jax.block_until_ready(with_gradients(make_function(*inputs[:2], ids, using=using))(*inputs, ids))
    # Races are only printed; the flag is None where detection did not run.
    assert interpret_pallas_call.races is not None and not interpret_pallas_call.races.races_found


def test_a_read_behind_the_keys_is_seen(monkeypatch):
    """What the grid above relies on: a kernel that is one block off fails there."""
    inputs, ids = draw_inputs(128, 1, 1, 64, dtype="float32", packed=False, rows=1)
    monkeypatch.setattr(tpu_forward.pl, "multiple_of", lambda start, block: start + block)
    with pytest.raises(Exception, match="[Oo]ut-of-bounds"):
        jax.block_until_ready(make_function(*inputs[:2], ids)(*inputs[:3], ids))
    pltpu.reset_tpu_interpret_mode_state()


def test_wholly_masked_blocks_are_not_computed():
    """Four documents of one block each: of 16 pairs of blocks 4 are met."""
    inputs, _ = draw_inputs(512, 1, 1, 64, dtype="float32", packed=False, rows=1)
    query, key, value, cotangent = inputs
    ids = {"segment_ids": jnp.asarray(np.repeat([1, 2, 3, 4], 128)[None], jnp.int32)}
    blocks = Blocks(128, 128, 128, 128, 128, 128)
    function = with_gradients(make_function(query, key, ids, using=kernels(blocks)))
    expected = function(query, key, value, cotangent, ids)
    # A NaN in a document would spread by 0 · NaN through every block that is computed, and only through those.
    poisoned = jnp.where((np.arange(512) // 128 == 1)[None, :, None, None], jnp.nan, value)
    results = function(query, key, poisoned, cotangent, ids)
    for ours, theirs in zip(results, expected, strict=True):
        rest = np.r_[0:128, 256:512]
        assert np.array_equal(ours[:, rest], theirs[:, rest])
    assert np.isnan(results[0][:, 128:256]).all()


def test_vmap_and_jit():
    inputs, ids = draw_inputs(140, 2, 1, 64, dtype="float32", packed=True, rows=4)
    function = make_function(*inputs[:2], ids, using=kernels(interpret=True))
    pairs = [x.reshape(2, 2, *x.shape[1:]) for x in (*inputs[:3], ids["segment_ids"])]
    y, lse = jax.vmap(lambda *inputs: function(*inputs[:3], {"segment_ids": inputs[3]}))(*pairs)
    together = jax.jit(function)(*inputs[:3], ids)
    # The two are different programs, in which XLA may fuse an operation differently: equal to float32's rounding.
    for apart, whole in zip((y, lse), together, strict=True):
        np.testing.assert_allclose(apart.reshape(whole.shape), whole, rtol=1e-6, atol=1e-6)


def test_on_a_mesh_each_device_has_its_rows_and_heads():
    inputs, ids = draw_inputs(140, 4, 2, 64, dtype="float32", packed=True, rows=4)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    using = kernels(interpret=True)
    alone = with_gradients(make_function(*inputs[:2], ids, using=using))(*inputs, ids)
    request = request_of(*inputs[:2], ids)._replace(heads=2, kv_heads=1)

    def function(query, key, value, ids):
        return fused_attention(using, query, key, value, segment_ids=ids["segment_ids"], positions=None,
                               request=request, mesh=mesh, batch_axes=("data", "fsdp"), tensor_axis="tensor")

    for ours, theirs in zip(with_gradients(function)(*inputs, ids), alone, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)
    with pytest.raises(ValueError, match=r"mesh axis 'tensor' of 2 must divide 3 query heads"):
        attention(inputs[0][:, :, :3], inputs[1][:, :, :1], inputs[2][:, :, :1], mesh=mesh)


@pytest.fixture
def on_tpu(monkeypatch):
    """The public function believes that it runs on one TPU v5e; its kernels are interpreted."""
    monkeypatch.setattr(attention_room, "find_device", lambda mesh=None: ("tpu", "TPU v5 lite"))


def test_auto_takes_pallas_on_a_tpu_and_names_what_remat_keeps(on_tpu, monkeypatch):
    inputs, ids = draw_inputs(128, 2, 1, 64, dtype="bfloat16", packed=True)
    several = str(jax.make_jaxpr(partial(attention, **ids))(*inputs[:3]))
    assert "attention_forward" not in several, "arrays may be split over several devices, and no kernel is"
    monkeypatch.setattr(attention_room.jax, "device_count", lambda: 1)
    text = str(jax.make_jaxpr(jax.grad(lambda query: attention(query, *inputs[1:3], **ids).sum()))(inputs[0]))
    assert "attention_forward" in text and "attention_backward" in text
    assert "name=attention_output" in text and "name=attention_log_sums" in text
    y, lse = jax.eval_shape(partial(attention, return_lse=True, **ids), *inputs[:3])
    assert (y.shape, y.dtype, lse.shape, lse.dtype) == ((2, 128, 2, 64), jnp.bfloat16, (2, 128, 2), jnp.float32)


@pytest.mark.parametrize(("changes", "message"), [
    ({"head_dim": 80}, "head dim 80 is not one of 64, 128, 256"),
    ({"dtype": "float16"}, "the query is float16, not one of bfloat16, float32"),
    ({"device_kind": "TPU v3"}, "there are no block sizes for TPU v3, only for v4, v5e, v5p, v6e, tpu7x"),
])
def test_what_the_kernels_cannot_do_goes_to_xla_or_is_refused(changes, message):
    request = make_request(length=128, heads=2, kv_heads=1, head_dim=64)._replace(
        platform="tpu", device_kind="TPU v5 lite")
    assert chosen(request=request) == "pallas"
    request = request._replace(**changes)
    assert chosen(request=request) == "xla"
    with pytest.raises(ValueError, match=f"'pallas' cannot run on tpu: {message}; what can: xla"):
        chosen("pallas", request=request)


def test_on_a_gpu_cudnn_takes_what_it_can(monkeypatch):
    request = make_request(length=128, heads=2, kv_heads=1, head_dim=64, segments=False)._replace(
        platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    with pytest.raises(ValueError, match="'cudnn' cannot run on gpu: .*there is no GPU here"):
        chosen("cudnn", request=request)
    monkeypatch.setattr(attention_room.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention_room.importlib.util, "find_spec", lambda name: True)
    assert chosen(request=request) == "cudnn"
    for changes, message in (({"segments": True}, "no segment ids"), ({"lse": True}, "log-sum-exp has no gradient"),
                             ({"dtype": "float32"}, "bfloat16 and float16"),
                             ({"positions": True}, "no positions"), ({"head_dim": 100}, "head dim 100")):
        with pytest.raises(ValueError, match=f"'cudnn' cannot run on gpu: .*{message}"):
            chosen("cudnn", request=request._replace(**changes))
    monkeypatch.setattr(attention_room.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the cuDNN wheel is not installed"):
        chosen("cudnn", request=request)
