"""Adapters beside the weights: what they compute, against weights that they were added to; and what has none."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.lora import LoraConfig
from ctllm_jax.config.model import ModelConfig
from ctllm_jax.model.decoder import Decoder, head_weights, init_params, init_table, make_cache
from ctllm_jax.model.flops import flops_per_token
from ctllm_jax.model.lora import PROJECTIONS, attach, count_adapters, lora_parameters, merge
from ctllm_jax.model.parameters import paths

CONFIG = ModelConfig(vocab_size=250, vocab_multiple=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
                     head_dim=8, ffn_size=48, context_length=512, qkv_bias=True, init_std=0.1)
LORA = LoraConfig(rank=4, alpha=8)


def make_adapters(lora=LORA, *, config=CONFIG, noise=0.05):
    """Adapters far from their beginning, so that A and B both matter."""
    adapters = init_table(lora_parameters(config, lora), jax.random.key(1))
    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return structure.unflatten([x + noise * jax.random.normal(key, x.shape)
                                for x, key in zip(leaves, keys, strict=True)])


def merged(params, adapters, *, scale):
    blocks = {name: merge(weight, **adapters["blocks"][name], scale=scale) if name in adapters["blocks"] else weight
              for name, weight in params["blocks"].items()}
    return {**params, "blocks": blocks}


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 32)).astype(np.int32)


def loss_of(params, tokens, **options):
    hidden, _ = Decoder(CONFIG, **options).apply({"params": params}, tokens)
    return jnp.mean(jnp.square(hidden @ head_weights(params)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_new_adapters_change_nothing(params, tokens, dtype):
    decoder = Decoder(CONFIG, dtype=dtype)
    adapters = init_table(lora_parameters(CONFIG, LORA), jax.random.key(1))
    # On the CPU XLA leaves out roundings to bfloat16 where it can, and two programs others.
    apply = jax.jit(lambda params: decoder.apply({"params": params}, tokens)[0],
                    compiler_options={"xla_allow_excess_precision": False})
    assert np.array_equal(apply(params), apply(attach(params, adapters, scale=LORA.scale)))


def test_a_begins_with_the_variance_of_peft():
    adapters = init_table(lora_parameters(CONFIG, LoraConfig(rank=64)), jax.random.key(1))["blocks"]
    for name, inputs in {"query": 32, "out": 32, "down": 48}.items():
        assert np.std(adapters[name]["a"]) == pytest.approx(1 / np.sqrt(3 * inputs), rel=0.05)
        assert np.all(np.asarray(adapters[name]["b"]) == 0)


@pytest.mark.parametrize("lora", [
    LORA, LoraConfig(rank=1, targets="query$|down"), LoraConfig(rank=5, targets="up|out", rslora=True)],
    ids=lambda lora: lora.targets)
def test_beside_the_weights_or_added_to_them(params, tokens, lora):
    """Outputs, and the gradients of A and B, are those of a plain decoder whose weights are W + scale · A·B."""
    adapters = make_adapters(lora)
    beside, added = (jax.jit(jax.value_and_grad(function))(adapters) for function in (
        lambda adapters: loss_of(attach(params, adapters, scale=lora.scale), tokens),
        lambda adapters: loss_of(merged(params, adapters, scale=lora.scale), tokens)))
    assert abs(float(loss_of(params, tokens)) - float(added[0])) > 1e-3 * float(added[0])
    assert float(beside[0]) == pytest.approx(float(added[0]), rel=1e-5)
    for ours, other in zip(jax.tree.leaves(beside[1]), jax.tree.leaves(added[1]), strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


@pytest.fixture(scope="module")
def gradients_of(params, tokens):
    """Options of the decoder -> gradients of A and B."""
    def loss(adapters, **options):
        return loss_of(attach(params, adapters, scale=LORA.scale), tokens, **options)

    return lambda **options: jax.tree.leaves(jax.jit(jax.grad(partial(loss, **options)))(make_adapters()))


@pytest.fixture(scope="module")
def plain(gradients_of):
    return gradients_of()


@pytest.mark.parametrize(("scan", "remat"), [(True, "none"), (True, "ffn"), (True, "block"), (False, "attention")])
def test_scan_and_remat_do_not_matter(gradients_of, plain, scan, remat):
    for ours, other in zip(gradients_of(scan_layers=scan, remat=remat), plain, strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("scan", [False, True])
def test_cached_decoding_takes_adapters(params, tokens, scan):
    decoder, both = Decoder(CONFIG, scan_layers=scan), attach(params, make_adapters(), scale=LORA.scale)
    full, _ = decoder.apply({"params": both}, tokens)
    cache = make_cache(CONFIG, rows=2, length=32, dtype=jnp.float32)
    first, cache = decoder.apply({"params": both}, tokens[:, :20], cache=cache)
    second, _ = decoder.apply({"params": both}, tokens[:, 20:], cache=cache)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), full, atol=1e-4)


def test_the_table_is_the_tree():
    table = lora_parameters(CONFIG, LORA)
    adapters = init_table(table, jax.random.key(0))
    shapes = {"/".join(part.key for part in path): leaf.shape
              for path, leaf in jax.tree_util.tree_leaves_with_path(adapters)}
    assert {path: entry.shape for path, entry in paths(table).items()} == shapes
    assert all(len(entry.dims) == len(entry.shape) for entry in paths(table).values())
    # r · (inputs + outputs) for each projection of each layer.
    assert count_adapters(CONFIG, LORA) == 2 * 4 * (64 + 2 * 48 + 64 + 3 * 80)
    assert set(adapters["blocks"]) == set(PROJECTIONS)


@pytest.mark.parametrize(("targets", "message"), [
    ("embedding", "hits embedding: what can be adapted is blocks/query, blocks/key"),
    ("query|norm", "hits blocks/attention_norm, blocks/ffn_norm, blocks/query_bias, final_norm"),
    ("head", "hits head"), ("q_proj", "'q_proj' hits no parameter: what can be adapted is blocks/query")])
def test_only_projections_are_adapted(targets, message):
    with pytest.raises(UserError, match=message):
        lora_parameters(CONFIG, LoraConfig(targets=targets))


def test_the_scales():
    assert LoraConfig(rank=16, alpha=32).scale == 2 and LoraConfig(rank=16, alpha=32, rslora=True).scale == 8


def test_frozen_weights_cost_two_thirds():
    """6 FLOPs a weight are forward, gradient of the input, gradient of the weight: the last is not computed."""
    full = flops_per_token(CONFIG, sequence_length=64)
    adapted = flops_per_token(CONFIG, sequence_length=64, lora=LORA)
    matmul = 2 * (32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48) + 32 * 256
    assert full.full - adapted.full == 2 * matmul - 6 * count_adapters(CONFIG, LORA)
    assert full.full - adapted.full == full.causal - adapted.causal
