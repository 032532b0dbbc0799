"""Cross-entropy against float64 and PyTorch, on every mesh; and the logits that are never held, nor computed twice."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ctllm_jax.losses.cross_entropy import chunked_cross_entropy, token_logps

AXES = ("data", "fsdp", "tensor")
B, S, D, V, VOCAB = 8, 6, 16, 64, 59
Z = 1e-2


def draw(seed=0):
    """hidden, head, targets, weights; the padded columns of the head shout, a fifth of the weights is 0."""
    draws = np.random.default_rng(seed)
    hidden = draws.standard_normal((B, S, D), np.float32)
    head = draws.standard_normal((D, V), np.float32)
    head[:, VOCAB:] = 1e3
    targets = draws.integers(0, VOCAB, (B, S)).astype(np.int32)
    targets[0, 0], targets[0, 1] = 0, VOCAB - 1
    weights = (draws.random((B, S)) * (draws.random((B, S)) > 0.2)).astype(np.float32)
    return hidden, head, targets, weights


def loss_float64(hidden, head, targets, weights, *, z_loss=Z):
    """(sum of loss, sum of weights, sum of the z-loss), all logits at once, in numpy."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)[:, :VOCAB]
    highest = logits.max(axis=-1, keepdims=True)
    log_normalizer = np.log(np.exp(logits - highest).sum(axis=-1)) + highest[..., 0]
    nats = log_normalizer - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    z = z_loss * log_normalizer**2
    return np.sum(weights * (nats + z)), np.sum(weights), np.sum(weights * z)


def evaluate(hidden, head, targets, weights, **options):
    """The three sums, and the gradients of the mean loss in hidden and head."""
    def mean(hidden, head):
        loss, weight, sums = chunked_cross_entropy(hidden, head, targets, weights, vocab_size=VOCAB, **options)
        return loss / weight, (loss, weight, sums["z_loss"])

    (_, sums), grads = jax.jit(jax.value_and_grad(mean, argnums=(0, 1), has_aux=True))(hidden, head)
    return sums, grads


def naive_gradients(hidden, head, targets, weights, *, z_loss=Z):
    """Of the mean, by differentiating the formula as it is written."""
    def mean(hidden, head):
        logits = (hidden @ head)[..., :VOCAB]
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
        nats = log_normalizer - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * (nats + z_loss * log_normalizer**2)) / weights.sum()

    return jax.jit(jax.grad(mean, argnums=(0, 1)))(hidden, head)


def assert_grads(ours, expected, *, tolerance=1e-5):
    for mine, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, other, atol=tolerance * np.abs(other).max(), rtol=0)


@pytest.mark.parametrize("z_loss", [0.0, Z])
@pytest.mark.parametrize("chunk_size", [1, 5, 7, 16, 47, 48, 4096])
def test_any_chunk_equals_float64(chunk_size, z_loss):
    """48 tokens: chunks that divide them, that do not, and that are larger."""
    inputs = draw()
    sums, grads = evaluate(*inputs, z_loss=z_loss, chunk_size=chunk_size)
    np.testing.assert_allclose(sums, loss_float64(*inputs, z_loss=z_loss), rtol=1e-5)
    assert_grads(grads, naive_gradients(*inputs, z_loss=z_loss))
    plain = partial(chunked_cross_entropy, vocab_size=VOCAB, z_loss=z_loss, chunk_size=chunk_size)
    undifferentiated = jax.jit(plain)(*inputs)
    np.testing.assert_allclose(undifferentiated[0], sums[0], rtol=1e-6)


def test_gradients_equal_finite_differences_in_float64():
    hidden, head, targets, weights = draw(1)
    slopes = evaluate(hidden, head, targets, weights, z_loss=Z, chunk_size=7)[1]
    for place, slope in enumerate(slopes):
        way = np.random.default_rng(place).standard_normal(slope.shape)
        ends = []
        for sign in (1, -1):
            moved = [np.asarray(x, np.float64) + (sign * 1e-5 * way if i == place else 0)
                     for i, x in enumerate((hidden, head))]
            loss, weight, _ = loss_float64(*moved, targets, weights)
            ends.append(loss / weight)
        assert np.sum(slope * way) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)


@pytest.mark.parity
def test_equals_pytorch():
    import torch

    hidden, head, targets, weights = draw(2)
    leaves = [torch.tensor(x, requires_grad=True) for x in (hidden, head)]
    logits = (leaves[0] @ leaves[1])[..., :VOCAB]
    wanted = torch.tensor(targets).long().reshape(-1)
    nats = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), wanted, reduction="none")
    mean = (nats * torch.tensor(weights).reshape(-1)).sum() / weights.sum()
    mean.backward()
    (loss, weight, _), grads = evaluate(hidden, head, targets, weights, chunk_size=10)
    assert loss / weight == pytest.approx(mean.item(), rel=1e-5)
    assert_grads(grads, [leaf.grad.numpy() for leaf in leaves])


def make_mesh(sizes):
    devices = jax.devices()[:int(np.prod(sizes))]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def place(mesh, hidden, head, targets, weights):
    """The inputs as a training step lays them out."""
    batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    layouts = (batch, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")), batch, batch)
    return [jax.device_put(x, layout) for x, layout in zip((hidden, head, targets, weights), layouts, strict=True)]


@pytest.mark.parametrize("chunk_size", [5, 4096])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4), (4, 2, 1), (2, 1, 2)],
                         ids=str)
def test_every_mesh_equals_one_device(sizes, chunk_size):
    """With tensor 8, a device's columns are all padding but for three."""
    inputs = draw(3)
    mesh = make_mesh(sizes)
    expected_sums, expected = evaluate(*inputs, z_loss=Z)
    placed = place(mesh, *inputs)
    sums, grads = evaluate(*placed, z_loss=Z, chunk_size=chunk_size, mesh=mesh)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-5)
    assert_grads(grads, expected)
    for grad, x in zip(grads, placed[:2], strict=True):
        assert grad.sharding.is_equivalent_to(x.sharding, grad.ndim)


def test_a_mesh_of_the_callers_own():
    """Other names, an axis that the loss does not know, and no fsdp."""
    mesh = jax.make_mesh((2, 2, 2), ("rows", "pipe", "cols"), axis_types=(AxisType.Auto,) * 3)
    inputs = draw(4)
    expected_sums, expected = evaluate(*inputs, z_loss=Z)
    sums, grads = evaluate(*inputs, z_loss=Z, chunk_size=5, mesh=mesh, batch_axes=("rows",), fsdp_axis=None,
                           tensor_axis="cols")
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-5)
    assert_grads(grads, expected)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=["alone", "mesh"])
def test_bfloat16_inputs_accumulate_in_float32(sizes):
    hidden, head, targets, weights = draw(5)
    hidden, head = jnp.asarray(hidden, jnp.bfloat16), head.astype(jnp.bfloat16).astype(np.float32)
    mesh = sizes and make_mesh(sizes)
    sums, grads = evaluate(hidden, head, targets, weights, z_loss=Z, chunk_size=5, mesh=mesh)
    np.testing.assert_allclose(sums, loss_float64(hidden.astype(np.float32), head, targets, weights), rtol=1e-5)
    assert grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
    expected = naive_gradients(hidden.astype(jnp.float32), head, targets, weights)
    assert_grads([grad.astype(np.float32) for grad in grads], expected, tolerance=0.01)


@pytest.mark.parametrize("sizes", [None, (2, 1, 4)], ids=["alone", "mesh"])
def test_padded_columns_take_no_gradient(sizes):
    _, (_, head_grad) = evaluate(*draw(6), z_loss=Z, mesh=sizes and make_mesh(sizes))
    assert np.all(head_grad[:, VOCAB:] == 0) and np.all(np.any(head_grad[:, :VOCAB] != 0, axis=0))


def test_a_token_without_weight_counts_for_nothing():
    hidden, head, targets, weights = draw(7)
    (loss, weight, _), (hidden_grad, head_grad) = evaluate(hidden, head, targets, weights, z_loss=Z)
    silent = weights == 0
    assert silent.any() and np.all(np.asarray(hidden_grad)[silent] == 0)
    changed = np.where(silent[..., None], 30 * hidden, hidden), head, np.where(silent, 1, targets), weights
    (other_loss, other_weight, _), (_, other_head_grad) = evaluate(*changed, z_loss=Z)
    assert (loss, weight) == (other_loss, other_weight) and np.array_equal(head_grad, other_head_grad)


def test_no_weight_at_all_is_zero():
    hidden, head, targets, weights = draw(8)
    def total(hidden, head):
        return chunked_cross_entropy(hidden, head, targets, 0 * weights, vocab_size=VOCAB, z_loss=Z, chunk_size=5)[0]
    loss, grads = jax.value_and_grad(total, argnums=(0, 1))(hidden, head)
    assert loss == 0 and all(np.all(grad == 0) for grad in grads)


def test_logits_are_computed_once():
    """Three matmuls with gradients, one without: no logits again in the backward pass."""
    inputs = draw(9)
    def count(function):
        return str(jax.make_jaxpr(function)(*inputs[:2])).count("dot_general")
    def total(hidden, head):
        return chunked_cross_entropy(hidden, head, *inputs[2:], vocab_size=VOCAB, chunk_size=7)[0]
    assert count(jax.grad(total, argnums=(0, 1))) == 3
    assert count(total) == 1


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=["alone", "mesh"])
def test_logits_of_all_tokens_are_never_held(sizes, differentiated):
    """By compiled memory: chunks of an eighth of a device's tokens need less than a third of its part of the logits."""
    rows, length, hidden, vocab = 8, 1024, 16, 4096
    mesh = sizes and make_mesh(sizes)
    parts = int(np.prod(sizes)) if sizes else 1
    tokens = rows * length // (4 if sizes else 1)
    shapes = (((rows, length, hidden), jnp.float32), ((hidden, vocab), jnp.float32), ((rows, length), jnp.int32),
              ((rows, length), jnp.float32))
    layouts = [None] * 4
    if mesh is not None:
        batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        layouts = [batch, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")), batch, batch]
    abstract = [jax.ShapeDtypeStruct(*shape, sharding=layout) for shape, layout in zip(shapes, layouts, strict=True)]

    def total(hidden, head, targets, weights, chunk_size):
        return chunked_cross_entropy(hidden, head, targets, weights, chunk_size=chunk_size, mesh=mesh)[0]

    def held(chunk_size):
        function = partial(total, chunk_size=chunk_size)
        function = jax.grad(function, argnums=(0, 1)) if differentiated else function
        return jax.jit(function).lower(*abstract).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * rows * length * vocab // parts
    assert held(tokens // 8) < logits / 3
    assert held(tokens) > 0.9 * logits  # so the measure does see what is held


def test_the_head_is_gathered_once_and_its_gradient_scattered():
    """Outside of the chunk loop; and only this device's part of the gradient goes over the data axis."""
    mesh = make_mesh((2, 4, 1))
    placed = place(mesh, *draw(10))
    def total(hidden, head):
        return chunked_cross_entropy(hidden, head, *placed[2:], vocab_size=VOCAB, chunk_size=2, mesh=mesh)[0]
    jaxpr = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(*placed[:2]))
    loop = jaxpr[jaxpr.index("scan["):]
    assert jaxpr.count("all_gather[") == 1 and "all_gather[" not in loop
    assert "reduce_scatter[" not in loop[:loop.index("reduce_scatter[")] and jaxpr.count("reduce_scatter[") == 1
    after = jaxpr[jaxpr.index("reduce_scatter["):]
    assert f"f32[{D // 4},{V}] = psum" in after.replace("psum_invariant", "psum")
    assert f"f32[{D},{V}] = psum" not in jaxpr


def test_vmap_is_a_loop():
    pairs = [np.stack(pair) for pair in zip(draw(11), draw(12), strict=True)]
    losses = jax.vmap(lambda *x: chunked_cross_entropy(*x, vocab_size=VOCAB, chunk_size=7)[0])(*pairs)
    for i, loss in enumerate(losses):
        assert loss == pytest.approx(loss_float64(*(x[i] for x in pairs), z_loss=0.0)[0], rel=1e-5)


@pytest.mark.parametrize(("options", "message"), [
    ({"batch_axes": ("rows",)}, "the mesh has the axes data, fsdp, tensor, and no rows"),
    ({"batch_axes": ("data",)}, "fsdp_axis='fsdp' must be one of batch_axes"),
])
def test_axes_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(*draw(), mesh=make_mesh((2, 2, 2)), **options)


def test_shapes_that_do_not_fit_are_named():
    hidden, head, targets, weights = draw()
    with pytest.raises(ValueError, match=r"targets \(8, 5\)"):
        chunked_cross_entropy(hidden, head, targets[:, :5], weights)
    with pytest.raises(ValueError, match=r"head \(15, 64\) be \[16, V\]"):
        chunked_cross_entropy(hidden, head[:15], targets, weights)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
@pytest.mark.parametrize(("rows", "length"), [(0, S), (B, 0)])
def test_no_tokens_have_no_loss(rows, length, sizes):
    hidden, head, targets, weights = draw()
    mesh = make_mesh(sizes) if sizes else None
    arrays = hidden[:rows, :length], head, targets[:rows, :length], weights[:rows, :length]

    def loss(hidden, head):
        total, weight, _ = chunked_cross_entropy(hidden, head, *arrays[2:], vocab_size=VOCAB, mesh=mesh)
        return total, weight

    (total, weight), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*arrays[:2])
    assert total == weight == 0 and grads[0].shape == arrays[0].shape and not np.any(grads[1])
    assert token_logps(*arrays[:3], mesh=mesh).shape == (rows, length)


@pytest.mark.parametrize(("change", "message"), [
    (dict(hidden=np.int32), "hidden is int32"), (dict(head=np.int32), "head is int32"),
    (dict(targets=np.float32), "targets are float32 and must be integers"), (dict(targets=bool), "targets are bool"),
    (dict(chunk_size=0), "chunk_size=0"), (dict(vocab_size=0), "vocab_size=0"),
    (dict(vocab_size=V + 1), "vocab_size=65 must be from 1 to the 64 columns")], ids=str)
def test_dtypes_and_numbers_that_do_not_fit_are_named(change, message):
    arrays = dict(zip(("hidden", "head", "targets", "weights"), draw(), strict=True))
    options = {name: value for name, value in change.items() if name not in arrays}
    arrays |= {name: arrays[name].astype(kind) for name, kind in change.items() if name in arrays}
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(*arrays.values(), **options)
    with pytest.raises(ValueError, match=message):
        token_logps(*list(arrays.values())[:3], **options)
    with pytest.raises(ValueError, match=r"head \(16,\)"):
        chunked_cross_entropy(arrays["hidden"].astype(np.float32), np.zeros(16, np.float32), *draw()[2:])
