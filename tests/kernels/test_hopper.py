"""Hopper's attention: the kernels' own source, simulated; the blocks that they skip; what CUDA's compiler makes."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.hopper_speed import fastest_lines
from ctllm_jax.cluster.gpu_target import find_gpus, missing_packages
from ctllm_jax.kernels.attention import attention, chosen, hopper, hopper_forward
from ctllm_jax.kernels.attention.fused import NOTHING_SEEN, Request
from ctllm_jax.kernels.attention.hopper_blocks import HopperBlocks, padded_ids, visible_blocks
from ctllm_jax.kernels.attention.reference import attention_mask, attention_reference
from ctllm_jax.kernels.hopper import RESERVED_BYTES
from tests.mosaic_simulator import simulated

H100 = "NVIDIA H100 80GB HBM3"


def request_of(length, heads=2, kv_heads=1, head_dim=64, **changes):
    return Request(length, heads, kv_heads, head_dim, "bfloat16", True, None, head_dim**-0.5, True, False, "gpu",
                   H100)._replace(**changes)


def segments_of(length, *, rows, seed=0):
    """Documents of random lengths in order, some of one token; padding behind, and inside of the first row."""
    draws = np.random.default_rng(seed)
    ids = np.zeros((rows, length), np.int32)
    for row in range(rows):
        lengths = np.maximum(1, draws.exponential(length / 4, size=length)).astype(int)
        ids[row] = np.repeat(np.arange(1, length + 1), lengths)[:length]
        ids[row, length - draws.integers(1, length // 8 + 2):] = 0
    ids[0, length // 3:length // 3 + 2] = 0
    return ids


def run(request, segments, *, rows, blocks, monkeypatch, seed=0):
    """((y, lse, gradients) of the kernels, simulated; the same of the dense reference in float32)."""
    draws = np.random.default_rng(seed)
    query, key, value, cotangent = (
        jnp.asarray(draws.standard_normal((rows, request.length, n, request.head_dim), np.float32), request.dtype)
        for n in (request.heads, request.kv_heads, request.kv_heads, request.heads))
    segments = None if segments is None else jnp.asarray(segments)
    if segments is not None:  # As fused_attention does.
        cotangent = jnp.where((segments > 0)[:, :, None, None], cotangent, 0)
    exact = [x.astype(jnp.float32) for x in (query, key, value, cotangent)]

    def dense(query, key, value):
        return attention_reference(query, key, value, segment_ids=segments, causal=request.causal,
                                   sliding_window=request.sliding_window, scale=request.scale)

    def log_sums(query, key):
        scores = jnp.einsum("BSKGH,BTKH->BKGST", query.reshape(*key.shape[:3], -1, key.shape[3]), key) * request.scale
        mask = attention_mask(request.length, segment_ids=segments, causal=request.causal,
                              sliding_window=request.sliding_window)
        scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
        return jnp.maximum(jax.nn.logsumexp(scores, axis=-1), NOTHING_SEEN).reshape(rows, request.heads, -1)

    expected, pullback = jax.vjp(dense, *exact[:3])
    expected = [expected, log_sums(*exact[:2]), *pullback(exact[3])]
    with simulated(monkeypatch):
        y, lse = hopper.forward(request, query, key, value, segments, None, blocks=blocks)
        delta = jnp.einsum("BSNH,BSNH->BNS", y.astype(jnp.float32), exact[3])
        grads = hopper.backward(request, query, key, value, segments, None, cotangent, lse, delta, blocks=blocks)
    assert all(x.dtype == request.dtype for x in (y, *grads)) and lse.dtype == jnp.float32
    return [np.asarray(x, np.float32) for x in (y, lse, *grads)], [np.asarray(x) for x in expected]


# name -> (request, rows of the batch, packed, blocks)
CASES = {
    "packed, GQA": (request_of(328, heads=4, kv_heads=2), 1, True, HopperBlocks()),
    "packed, both directions, odd length": (request_of(131, causal=False), 2, True, HopperBlocks()),
    "one document": (request_of(264, heads=1, segments=False), 1, False, HopperBlocks(alternate=False)),
    "one document, both directions, shorter than a block": (
        request_of(75, heads=1, segments=False, causal=False), 1, False, HopperBlocks()),
    "packed, window": (request_of(256, heads=1, sliding_window=70), 1, True, HopperBlocks()),
    "packed, float16, other blocks": (request_of(200, heads=1, dtype="float16"), 1, True, HopperBlocks(
        forward_groups=3, forward_keys=64, forward_stages=3, dkv_stages=3, dq_keys=128)),
    "head dim 128, scale": (request_of(136, heads=1, head_dim=128, scale=0.5), 1, True, HopperBlocks()),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_simulated_equal_the_dense_reference(name, monkeypatch):
    request, rows, packed, blocks = CASES[name]
    segments = segments_of(request.length, rows=rows) if packed else None
    ours, dense = run(request, segments, rows=rows, blocks=blocks, monkeypatch=monkeypatch)
    for what, x, expected in zip(("y", "lse", "dq", "dk", "dv"), ours, dense, strict=True):
        seen = expected > NOTHING_SEEN
        assert np.array_equal(x > NOTHING_SEEN, seen), what
        size = max(1, np.abs(expected[seen]).max())
        np.testing.assert_allclose(x[seen], expected[seen], atol=(0.01 if what != "lse" else 1e-4) * size, err_msg=what)


def test_padding_gives_zeros_and_no_gradient(monkeypatch):
    """A row of nothing else, and blocks of nothing else."""
    segments = segments_of(256, rows=2, seed=1)
    segments[0], segments[1, 130:] = 0, 0
    (y, lse, *grads), _ = run(request_of(256), segments, rows=2, blocks=HopperBlocks(), monkeypatch=monkeypatch)
    real = segments > 0
    assert all(np.all(np.isfinite(x)) for x in (y, lse, *grads))
    assert all(np.all(x[~real] == 0) for x in (y, *grads))
    assert all(np.all(np.any(x[real] != 0, axis=(1, 2))) for x in (y, grads[2]))
    assert np.all((lse == NOTHING_SEEN).all(axis=1) == ~real)


def test_the_simulator_sees_a_buffer_that_is_used_too_early(monkeypatch):
    """All steps in one stage of the ring: the next keys arrive while these are read."""
    monkeypatch.setattr(hopper_forward, "slot_of", lambda count, stages: 0 * count)
    with pytest.raises((RuntimeError, AssertionError, RuntimeWarning)):  # a warning: what is read may be no number
        ours, dense = run(request_of(384, causal=False), np.ones((1, 384), np.int32), rows=1, blocks=HopperBlocks(),
                          monkeypatch=monkeypatch)
        np.testing.assert_allclose(ours[0], dense[0], atol=0.02)


@pytest.mark.parametrize("by_key", [False, True], ids=["by query", "by key"])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 9)], ids=str)
def test_no_block_is_missed(causal, window, by_key):
    """Against the dense mask, on ids in order and out of order; in order no block is met in vain."""
    for seed in range(9):
        for length, query_block, key_block in ((61, 8, 16), (64, 16, 8)):
            ids = segments_of(length, rows=2, seed=seed)
            if seed % 3 == 2:
                ids = np.random.default_rng(seed).integers(0, 4, (2, length)).astype(np.int32)
            padded = -(-length // 16) * 16
            query_ids, key_ids = padded_ids(jnp.asarray(ids), batch=2, length=length, padded=padded)
            bounds = np.asarray(visible_blocks(key_ids, query_block=query_block, key_block=key_block, causal=causal,
                                               sliding_window=window, by_key=by_key))
            mask = np.array(attention_mask(padded, segment_ids=jnp.pad(ids, ((0, 0), (0, padded - length))),
                                           causal=causal, sliding_window=window))
            place = np.arange(padded)
            same = np.asarray(query_ids)[:, :, None] == np.asarray(key_ids)[:, None]
            seen = same & ((place <= place[:, None]) | (not causal))
            assert np.array_equal(seen & (place[:, None] - place < (window or padded)), mask) or not causal
            blocks = mask.reshape(2, padded // query_block, query_block, padded // key_block, key_block)
            some, every = blocks.any(axis=(2, 4)), blocks.all(axis=(2, 4))
            if by_key:
                some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
            for row, block in np.ndindex(some.shape[:2]):
                first, whole_first, whole_end, end = bounds[row, block]
                met, columns = np.flatnonzero(some[row, block]), np.arange(some.shape[2])
                assert 0 <= first < end <= some.shape[2]
                assert np.all((first <= met) & (met < end))
                assert np.all(every[row, block][(columns >= whole_first) & (columns < whole_end)])
                if seed % 3 != 2:
                    assert not met.size or (first, end) == (met[0], met[-1] + 1)


@pytest.mark.parametrize(("changes", "message"), [
    ({"device_kind": "NVIDIA A100-SXM4-80GB"}, "for Hopper .* and this is NVIDIA A100"),
    ({"platform": "cpu", "device_kind": "cpu"}, "for Hopper .* and this is cpu"),
    ({"dtype": "float32"}, "bfloat16 and float16, and the query is float32"),
    ({"positions": True}, "places in the row"),
    ({"head_dim": 96}, "head dim 96 is not a multiple of 64"),
    ({"head_dim": 256}, "at head dim 256 needs .* registers"),
    ({"scale": -1.0}, "scale=-1.0 must be positive"),
])
def test_what_it_does_not_do_has_a_reason(changes, message):
    assert hopper.refusal(request_of(64)) is None
    assert hopper.refusal(request_of(64, device_kind="NVIDIA GH200 480GB")) is None
    with pytest.raises(ValueError, match=message):
        raise ValueError(hopper.refusal(request_of(64, **changes)))


@pytest.mark.parametrize(("sizes", "message"), [
    ({"forward_keys": 96}, "forward_keys is 96, and must be a positive multiple of 64"),
    ({"dkv_queries": 0}, "dkv_queries is 0, and must be"),
    ({"forward_keys": 320}, "320 wide, and a matrix instruction 256"),
    ({"forward_keys": 256}, "the forward kernel at head dim 128 needs 256 registers .* a thread has 240"),
    ({"dq_groups": 3}, "the dq kernel .* with 3 computing groups a thread has 160"),
    ({"forward_stages": 4}, r"the forward kernel at head dim 128 needs \d+ bytes of shared memory, .* has 232448"),
    ({"forward_keys": 192}, "the forward kernel at head dim 128 needs 233472 bytes of shared memory"),
    ({"dq_stages": 1}, "dq_stages is 1, and must be at least 2"),
    ({"dq_groups": 4}, "dq_groups is 4, and must be one of 2, 3"),
])
def test_a_block_size_that_does_not_fit_names_the_limit(sizes, message):
    HopperBlocks().check(128)
    with pytest.raises(ValueError, match=message):
        HopperBlocks(**sizes).check(128)


def test_auto_takes_them_where_a_measurement_says_so_and_a_name_always(monkeypatch):
    request = request_of(512, head_dim=128)
    assert chosen(request=request) == "xla" and chosen("pallas", request=request) == "pallas"
    monkeypatch.setattr(hopper, "FASTEST", {(128, "bfloat16", True)})
    assert chosen(request=request) == "pallas"
    assert chosen(request=request._replace(dtype="float16")) == chosen(request=request._replace(head_dim=96)) == "xla"
    with pytest.raises(ValueError, match="'pallas' cannot run on gpu: .* positions; what can: xla"):
        chosen("pallas", request=request._replace(positions=True))
    with pytest.raises(ValueError, match="for TPU and Hopper GPUs"):
        chosen("pallas", request=request._replace(device_kind="NVIDIA A100-SXM4-80GB"))


def test_the_benchmark_names_what_is_fastest_everywhere():
    """Both ways, at every length, and against every other; where one is missing nothing is said."""
    rows = [{"by": by, "length": length, "packed": packed, "what": what, "seconds": time}
            for length in (2048, 4096) for what in ("forward", "forward + backward")
            for by, packed, time in (("pallas", True, 1.0), ("pallas", True, 3.0), ("xla", True, 2.0),
                                     ("pallas", False, 1.0), ("xla", False, 5.0))]
    rows += [{"by": "cudnn", "length": 4096, "packed": False, "what": "forward", "seconds": 0.9}, {"what": "check"}]
    assert fastest_lines(rows) == ['(128, "bfloat16", True)']
    assert fastest_lines([row for row in rows if row.get("by") == "pallas"]) == []


needs_cuda = pytest.mark.skipif(
    bool(missing_packages()), reason=f"JAX's CUDA plugin is not installed: {', '.join(missing_packages())}")


@pytest.mark.slow
@pytest.mark.aot
@needs_cuda
def test_a_mesh_runs_them_on_each_device():
    """Rows over two devices, heads over two: by CUDA's compiler nothing is gathered."""
    devices = np.array(find_gpus("h100", 4)).reshape(2, 1, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))

    def on_mesh(*shape, dtype=jnp.bfloat16, heads=None):
        spec = jax.sharding.PartitionSpec(("data", "fsdp"), None, *([heads] if heads else []))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    def loss(query, key, value, segments):
        y = attention(query, key, value, segment_ids=segments, implementation="pallas", mesh=mesh)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    query, key = (on_mesh(4, 512, heads, 64, heads="tensor") for heads in (4, 2))
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(
        query, key, key, on_mesh(4, 512, dtype=jnp.int32)).compile().as_text()
    assert "mosaic_gpu" in text and "all-gather" not in text


@pytest.mark.slow
@pytest.mark.aot
@needs_cuda
def test_cuda_compiles_the_kernels_without_spills(repository, tmp_path):
    """In a process of its own, because the compiler writes where its environment says."""
    output = tmp_path / "compile.json"
    subprocess.run([sys.executable, "benchmarks/hopper_compile.py", "--only-defaults", "--output", str(output)],
                   cwd=repository, check=True)
    sections = json.loads(output.read_text())["sections"]
    assert set(sections) == {"attention_forward", "attention_dkv", "attention_dq", "swiglu_product", "swiglu_products",
                             "swiglu_gradients"}
    for row in (row for columns in sections.values() for row in columns.values()):
        assert row["spill_bytes"] == 0 and row["wgmma"] > 0 and row["tma"] > 0, row
        assert row["serialized"] == 0, row  # The compiler found no matmul that it had to wait for.
        assert 0 <= row["shared_bytes"] - row["counted_shared_bytes"] <= RESERVED_BYTES, row
