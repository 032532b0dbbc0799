"""The mesh, what lies where on it, and the embedding lookup on every shape of it."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ctllm_jax.config.axes import BATCH_AXES, find_batch_axes
from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.losses.cross_entropy import chunked_cross_entropy
from ctllm_jax.model.parameters import Parameter, decoder_parameters, paths
from ctllm_jax.sharding import (
    RULES,
    axis_size,
    batch_sharding,
    embed_tokens,
    local_rows,
    make_mesh,
    param_shardings,
    partition_spec,
    replicated,
)

MESHES = [(2, 2, 2), (1, 8, 1), (1, 1, 8), (8, 1, 1)]


AXES = ("data", "fsdp", "tensor")


def mesh_of(*sizes):
    return make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[:int(np.prod(sizes))])


@pytest.mark.parametrize(("sizes", "shape"), [
    ((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 4, -1), (1, 4, 2)), ((1, 8, -1), (1, 8, 1)),
    ((2, 2, 2), (2, 2, 2))])
def test_minus_one_is_what_the_others_leave(sizes, shape):
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
    assert tuple(mesh.shape[axis] for axis in AXES) == shape
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (1, 16, 1), (-1, 16, 1), (2, 2, 1), (1, 1, 1)])
def test_a_mesh_that_does_not_fit_gives_the_numbers(sizes):
    with pytest.raises(ValueError) as caught:
        make_mesh(dict(zip(AXES, sizes, strict=True)))
    assert f"mesh data {sizes[0]} x fsdp {sizes[1]} x tensor {sizes[2]} does not cover 8 devices" in str(caught.value)


def test_specs_of_dims():
    assert partition_spec(("vocab", "embed")) == PartitionSpec("tensor", "fsdp")
    assert partition_spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(None, "fsdp", "tensor", None)
    assert partition_spec(("batch", None)) == PartitionSpec(("replica", "data", "fsdp"), None)


@pytest.mark.parametrize("dims", [("vocab", "heads"), ("batch", "embed"), ("embed", "embed"), ("heads", None, "ffn")])
def test_two_dims_that_want_one_axis(dims):
    with pytest.raises(ValueError, match="use one mesh axis twice"):
        partition_spec(dims)


def test_an_unknown_dim_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="dim 'head' .*vocab"):
        partition_spec(("head", "embed"))


def test_every_dim_of_the_decoder_has_a_rule():
    config = load(PretrainConfig, target="debug/pretrain", overrides=["model.qkv_bias=true"]).model
    dims = {dim for parameter in paths(decoder_parameters(config)).values() for dim in parameter.dims}
    assert {"embed", "vocab", "heads", "kv_heads", "ffn"} <= dims <= set(RULES)


@pytest.mark.parametrize(("table", "message"), [
    ({"blocks": {"gate": Parameter((2, 32, 97), ("layers", "embed", "ffn"), 0.02)}},
     "parameter blocks/gate: its ffn of 97 cannot be split over mesh axis tensor of 2"),
    ({"embedding": Parameter((256, 30), ("vocab", "embed"), 0.02)},
     "parameter embedding: its embed of 30 cannot be split over mesh axis fsdp of 4")])
def test_a_dim_that_cannot_be_split_gives_the_numbers(table, message):
    with pytest.raises(ValueError, match=message):
        param_shardings(table, mesh_of(1, 4, 2))


def test_each_device_holds_its_part():
    config = load(PretrainConfig, target="debug/pretrain").model
    table, mesh = decoder_parameters(config), mesh_of(2, 2, 2)
    shardings = param_shardings(table, mesh)
    parts = {"embedding": (256 // 2, 32 // 2), "final_norm": (32,), "head": (32 // 2, 256 // 2)}
    for name, part in parts.items():
        assert shardings[name].shard_shape(table[name].shape) == part
    assert shardings["blocks"]["key"].shard_shape(table["blocks"]["key"].shape) == (2, 32 // 2, 2 // 2, 8)
    assert shardings["blocks"]["out"].shard_shape(table["blocks"]["out"].shape) == (2, 4 // 2, 8, 32 // 2)


def test_sizes_of_axes():
    mesh = mesh_of(2, 4, 1)
    assert [axis_size(mesh, axes) for axes in (None, "fsdp", ("data", "fsdp"), "tensor")] == [1, 4, 8, 1]
    assert batch_sharding(mesh).shard_shape((16, 5)) == (2, 5)
    assert replicated(mesh).shard_shape((16, 5)) == (16, 5)


class Elsewhere:
    """A sharding whose second half of devices is another process's."""

    def __init__(self, sharding):
        self.sharding = sharding

    def addressable_devices_indices_map(self, shape):
        return {device: index for device, index in self.sharding.devices_indices_map(shape).items() if device.id < 4}


@pytest.mark.parametrize(("sizes", "rows", "mine"), [
    ((8, 1, 1), 16, range(8)), ((2, 4, 1), 8, range(4)), ((2, 2, 2), 8, range(4)), ((1, 1, 8), 8, range(8)),
    ((1, 2, 4), 6, range(3))])
def test_rows_of_a_process(monkeypatch, sizes, rows, mine):
    """Devices 0 to 3 of 8 are this process's: it needs the rows that they hold, and no others."""
    mesh = mesh_of(*sizes)
    assert local_rows(mesh, rows) == list(range(rows))
    monkeypatch.setattr("ctllm_jax.sharding.batch_sharding", lambda mesh: Elsewhere(batch_sharding(mesh)))
    assert local_rows(mesh, rows) == list(mine)


@pytest.fixture(scope="module")
def lookup():
    """Embedding [64, 16], tokens [8, 6] in which some ids stand often, and the weights of a sum over the result."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 64, (8, 6))
    tokens[:, 0], tokens[0] = 63, 0
    return (generator.normal(size=(64, 16)).astype(np.float32), tokens.astype(np.int32),
            generator.normal(size=(8, 6, 16)).astype(np.float32))


def weighted(embed, embedding_VD, tokens_BS, weights_BSD):
    x_BSD = embed(embedding_VD, tokens_BS)
    return jnp.sum(x_BSD.astype(jnp.float32) * weights_BSD), x_BSD


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_lookup_is_the_plain_one(lookup, sizes, dtype):
    embedding, tokens, weights = lookup
    mesh = mesh_of(*sizes)
    embedding_VD = jax.device_put(embedding, NamedSharding(mesh, PartitionSpec("tensor", "fsdp")))
    tokens_BS, weights_BSD = (jax.device_put(x, batch_sharding(mesh)) for x in (tokens, weights))
    ours = jax.jit(jax.value_and_grad(partial(weighted, partial(embed_tokens, mesh=mesh, dtype=dtype)), has_aux=True))
    (_, x_BSD), gradient_VD = ours(embedding_VD, tokens_BS, weights_BSD)
    plain = jax.value_and_grad(partial(weighted, lambda table, ids: jnp.take(table, ids, axis=0).astype(dtype)),
                               has_aux=True)
    (_, wanted_BSD), wanted_VD = plain(jnp.asarray(embedding), jnp.asarray(tokens), jnp.asarray(weights))
    # A lookup moves numbers: not a bit differs. The gradient adds them up, in another order.
    assert x_BSD.dtype == dtype and np.array_equal(np.asarray(x_BSD), np.asarray(wanted_BSD))
    np.testing.assert_allclose(gradient_VD, wanted_VD, **({"rtol": 1e-5, "atol": 1e-6} if dtype == jnp.float32
                                                          else {"rtol": 0.02, "atol": 0.1}))
    assert x_BSD.sharding.is_equivalent_to(batch_sharding(mesh), 3)
    assert gradient_VD.sharding.shard_shape((64, 16)) == (64 // sizes[2], 16 // sizes[1])


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)], ids=str)
def test_the_lookup_never_gathers_the_table(lookup, sizes):
    """No device ever holds [64, …] rows of full width: what the partitioner makes of a plain lookup."""
    embedding, tokens, _ = lookup
    mesh = mesh_of(*sizes)
    split = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    arguments = (jax.ShapeDtypeStruct(embedding.shape, jnp.float32, sharding=split),
                 jax.ShapeDtypeStruct(tokens.shape, jnp.int32, sharding=batch_sharding(mesh)))
    text = jax.jit(partial(embed_tokens, mesh=mesh, dtype=jnp.float32)).lower(*arguments).compile().as_text()
    assert "all-to-all" in text and "f32[64,16]" not in text


def test_the_batch_axes_of_a_mesh_are_those_that_it_has():
    assert find_batch_axes(("replica", *AXES)) == BATCH_AXES == ("replica", "data", "fsdp")
    assert find_batch_axes(("data", "fsdp", "tensor")) == ("data", "fsdp")
    assert find_batch_axes(("rows", "columns")) == BATCH_AXES  # an error then names them


def test_a_loss_takes_every_batch_axis_of_a_mesh_by_default():
    mesh = make_mesh({"replica": 2, "data": 2, "fsdp": 2}, jax.devices())
    arrays = jnp.zeros((8, 4, 2)), jnp.zeros((2, 16)), jnp.zeros((8, 4), jnp.int32), jnp.ones((8, 4))
    program = str(jax.make_jaxpr(lambda *arrays: chunked_cross_entropy(*arrays, mesh=mesh)[0])(*arrays))
    assert re.search(r"psum\w*\[\s*axes=\('replica', 'data', 'fsdp'\)", program)
