"""Steps around a ring by remote copies, in the interpreter of TPU kernels: what arrives, and whole sums.

Its kernels end together on all devices, so none is ever a step ahead: what the barrier is for, it cannot show.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from ctllm_jax import ring_copies
from ctllm_jax.gathered import Rings, scatter_sum
from ctllm_jax.kernels.ring import cases

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def exchange(arrays, neighbors, *, axis, barrier):
    """`send` and `receive` as one kernel: the interpreter has no semaphores that outlive a kernel."""
    def kernel(targets_ref, first, second, from_before, from_next, *semaphores):
        ring_copies._send(targets_ref, first, second, None, None, from_before, from_next, *semaphores)
        ring_copies._receive(first, second, from_before, from_next, *semaphores)

    spec = pl.BlockSpec(memory_space=pltpu.HBM)
    arrived = pl.pallas_call(
        kernel, out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays],
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), spec, spec], out_specs=[spec, spec],
        scratch_shapes=[pltpu.SemaphoreType.DMA(())] * 4, interpret=STRICT,
        compiler_params=pltpu.CompilerParams(collective_id=barrier, has_side_effects=True),
    )(jnp.stack([ring_copies._number(axis, index) for index in neighbors]), *arrays)
    return ring_copies.Moving(arrays, arrived, ())


@pytest.fixture
def interpreted(monkeypatch):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    monkeypatch.setattr(ring_copies, "send", exchange)
    monkeypatch.setattr(ring_copies, "receive", lambda moving: moving.arriving)
    yield
    # Races are only printed; the flag is None where detection did not run.
    assert interpret_pallas_call.races is not None and not interpret_pallas_call.races.races_found


def make_mesh(**sizes):
    count = int(np.prod(list(sizes.values())))
    return Mesh(np.array(jax.devices()[:count]).reshape(*sizes.values()), tuple(sizes))


def on(mesh, function):
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec(mesh.axis_names),
                                 out_specs=PartitionSpec(mesh.axis_names), check_vma=False))


def test_one_array_goes_ahead_and_one_back(interpreted):
    mesh = make_mesh(data=2, fsdp=4)

    def step(x):
        index = jax.lax.axis_index("fsdp")
        moving = ring_copies.send([x, 10 * x], [(index + 1) % 4, (index - 1) % 4], axis="fsdp", barrier=0)
        return jnp.stack(ring_copies.receive(moving), 1)

    x = np.arange(8 * 8 * 128, dtype=np.float32).reshape(64, 128)
    found = np.asarray(on(mesh, step)(x)).reshape(2, 4, 8, 2, 128)
    expected = x.reshape(2, 4, 8, 128)
    np.testing.assert_array_equal(found[:, :, :, 0], np.roll(expected, 1, 1))
    np.testing.assert_array_equal(found[:, :, :, 1], 10 * np.roll(expected, -1, 1))


@pytest.mark.parametrize(("sizes", "rings"), [
    ({"fsdp": 8}, (2, 4)), ({"fsdp": 4, "tensor": 2}, (4,))], ids=str)
def test_sums_that_go_around_by_copies_are_those_of_a_reduction(interpreted, sizes, rings):
    """Twice after each other, as two layers do."""
    mesh, devices = make_mesh(**sizes), sizes["fsdp"]

    def around(x):
        for _ in range(2):
            def block(start, size, half, x=x):
                return jax.lax.dynamic_slice_in_dim(x, start, size, 0)[:, half]

            part = scatter_sum(block, size=x.shape[0], other=x.shape[1], axis="fsdp", dim=0,
                               rings=Rings(rings, remote=True))
            x = jnp.tile(part, (devices, 1)) * (1 + jax.lax.axis_index("fsdp"))
        return part

    def reduced(x):
        for _ in range(2):
            part = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)
            x = jnp.tile(part, (devices, 1)) * (1 + jax.lax.axis_index("fsdp"))
        return part

    x = np.random.default_rng(0).integers(-9, 9, (64 * 8, 256)).astype(np.float32)  # sums of whole numbers are exact
    np.testing.assert_array_equal(on(mesh, around)(x), on(mesh, reduced)(x))


def test_what_kernels_check_compares(interpreted, monkeypatch):
    monkeypatch.setattr(cases, "_find", lambda mesh, implementation: Rings((2, 4), remote=True))
    monkeypatch.setattr(cases, "SUMS", 3)
    for check in cases.checks():
        [(error, tolerance)] = check.compare("pallas").values()
        assert error < tolerance, check.case


def test_what_kernels_bench_times_is_the_gradient_of_a_weight(monkeypatch):
    monkeypatch.setattr(cases, "_find", lambda mesh, implementation: Rings((2, 4)))
    [bench] = cases.benches(lengths=[8], rows=2, hidden=16, ffn=6, dtype="float32")
    function, (x_TI, dy_TO) = bench.prepare("xla")
    np.testing.assert_allclose(function(x_TI, dy_TO), np.asarray(x_TI).T @ np.asarray(dy_TO), atol=1e-4)
