"""The decoder against transformers, and its own promises: causality, isolation, cache, scan, remat."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctllm_jax.config.model import ModelConfig
from ctllm_jax.model.decoder import SAVED_NAMES, Decoder, head_weights, init_params, make_cache
from ctllm_jax.model.parameters import count_parameters, decoder_parameters, paths

CONFIG = ModelConfig(vocab_size=250, vocab_multiple=64, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2,
                     head_dim=8, ffn_size=48, context_length=512)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def draw_tokens(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, length)).astype(np.int32)


def packed(rows, length, *, cut):
    """Segment ids and positions of two documents and two tokens of padding a row."""
    segments = np.where(np.arange(length) < cut, 1, 2)
    positions = np.where(np.arange(length) < cut, np.arange(length), np.arange(length) - cut)
    segments[-2:], positions[-2:] = 0, 0
    return (np.broadcast_to(x, (rows, length)).astype(np.int32) for x in (segments, positions))


@pytest.mark.parity
@pytest.mark.parametrize("changes", [
    {}, {"num_kv_heads": 4}, {"tie_embeddings": True, "rope_theta": 5e5, "norm_eps": 1e-3},
    {"num_kv_heads": 1, "head_dim": 16}], ids=["gqa", "mha", "tied", "mqa"])
def test_logits_equal_transformers(changes):
    import torch

    from tests.model.llama import make_llama

    config = CONFIG.model_copy(update=changes)
    params = init_params(config, jax.random.key(1))
    # Larger than at initialisation, so that attention and norms are far from trivial.
    noise = jax.random.key(2)
    params = jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x + 0.1 * jax.random.normal(noise, x.shape), params)
    tokens = draw_tokens(2, 512)
    hidden, _ = jax.jit(Decoder(config).apply)({"params": params}, tokens)
    ours = np.asarray(hidden @ head_weights(params))
    with torch.no_grad():
        theirs = make_llama(config, params)(torch.tensor(tokens).long()).logits.numpy()
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)


def test_the_table_is_the_tree(params):
    table = paths(decoder_parameters(CONFIG))
    tree = {"/".join(part.key for part in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert {name: entry.shape for name, entry in table.items()} == {name: leaf.shape for name, leaf in tree.items()}
    assert all(len(entry.dims) == len(entry.shape) for entry in table.values())
    assert sum(leaf.size for leaf in tree.values()) == count_parameters(CONFIG)
    declared = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert jax.tree.map(lambda x: x.shape, declared) == jax.tree.map(lambda x: x.shape, params)


def test_initial_weights_are_megatrons(params):
    blocks = params["blocks"]
    for name in ("query", "key", "value", "gate", "up"):
        assert np.std(blocks[name]) == pytest.approx(0.02, rel=0.1)
        assert np.std(blocks["out"]) == pytest.approx(0.02 / np.sqrt(2 * CONFIG.num_layers), rel=0.1)
    assert np.all(np.asarray(blocks["attention_norm"]) == 1)
    assert not np.allclose(blocks["gate"], blocks["up"])


def test_a_token_sees_no_later_one(params):
    """By gradients: position 20's hidden state does not depend on any later embedding, and does on every earlier."""
    tokens = draw_tokens(1, 40)
    decoder = Decoder(CONFIG)

    def last(offsets_SD):
        moved = decoder.clone(embed=lambda table, ids: jnp.take(table, ids, axis=0) + offsets_SD[None])
        return moved.apply({"params": params}, tokens)[0][0, 20].sum()

    influence = np.abs(jax.grad(last)(jnp.zeros((40, CONFIG.hidden_size)))).sum(axis=1)
    assert np.all(influence[21:] == 0) and np.all(influence[:21] > 0)


def test_document_two_does_not_feel_document_one(params):
    segments, positions = packed(2, 48, cut=20)
    apply = jax.jit(Decoder(CONFIG).apply)
    tokens = draw_tokens(2, 48)
    before = apply({"params": params}, tokens, segments, positions)[0]
    changed = tokens.copy()
    changed[:, :20] = (changed[:, :20] + 7) % CONFIG.vocab_size
    after = apply({"params": params}, changed, segments, positions)[0]
    assert np.array_equal(before[:, 20:46], after[:, 20:46])
    assert not np.array_equal(before[:, :20], after[:, :20])
    assert np.all(np.isfinite(after))


def test_packed_equals_alone(params):
    segments, positions = packed(1, 48, cut=20)
    tokens = draw_tokens(1, 48)
    apply = jax.jit(Decoder(CONFIG).apply)
    together = apply({"params": params}, tokens, segments, positions)[0]
    np.testing.assert_allclose(together[:, 20:46], apply({"params": params}, tokens[:, 20:46])[0], rtol=1e-5, atol=1e-5)


def test_window_limits_what_is_seen(params):
    config = CONFIG.model_copy(update={"sliding_window": 4})
    tokens = draw_tokens(1, 32)
    apply = jax.jit(Decoder(config).apply)
    changed = tokens.copy()
    changed[:, 0] = (changed[:, 0] + 1) % CONFIG.vocab_size
    before, after = (apply({"params": params}, x)[0] for x in (tokens, changed))
    reach = 3 * CONFIG.num_layers  # three tokens back in each of the layers
    assert np.array_equal(before[:, reach + 1:], after[:, reach + 1:])
    assert not np.array_equal(before[:, reach], after[:, reach])


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 6}, {"qkv_bias": True}], ids=["plain", "window", "bias"])
def test_cached_decoding_equals_the_full_forward(changes):
    config = CONFIG.model_copy(update=changes)
    noise = jax.random.key(5)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(noise, x.shape), params)
    decoder = Decoder(config)
    tokens = draw_tokens(2, 24)
    full = decoder.apply({"params": params}, tokens)[0]
    apply = jax.jit(decoder.apply)
    # Rows of different lengths, padded on the right: 10 and 7 real tokens first, then one at a time.
    lengths = np.array([10, 7], np.int32)
    real = (np.arange(12)[None] < lengths[:, None]).astype(np.int32)
    cache = make_cache(config, rows=2, length=32, dtype=jnp.float32)
    hidden, cache = apply({"params": params}, tokens[:, :12], real, cache=cache)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(hidden[row, :length], full[row, :length], atol=1e-4)
    for _ in range(12):
        place = np.asarray(cache.length)
        new = np.take_along_axis(tokens, place[:, None], axis=1)
        hidden, cache = apply({"params": params}, new, cache=cache)
        np.testing.assert_allclose(hidden[:, 0], np.asarray(full)[np.arange(2), place], atol=1e-4)


def test_scanned_equals_unrolled(params):
    tokens = draw_tokens(2, 32)

    def loss(params, scan):
        hidden, _ = Decoder(CONFIG, scan_layers=scan).apply({"params": params}, tokens)
        return jnp.sum(jnp.square(hidden @ head_weights(params)))

    scanned, unrolled = (jax.tree.leaves(jax.jit(jax.grad(partial(loss, scan=scan)))(params)) for scan in (True, False))
    for ours, other in zip(scanned, unrolled, strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


def test_remat_saves_memory_rung_by_rung():
    """By the memory of the compiled step: a rung that only looks right in the jaxpr would show here.

    Scanned: XLA's CPU compiler merges the two computations of unrolled blocks again (on a TPU it does not: test_aot).
    """
    config = CONFIG.model_copy(update={"num_layers": 8, "ffn_size": 256})
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    sizes = {}
    for remat in ("none", "ffn", "attention", "block"):
        def loss(params, tokens, remat=remat):
            hidden, _ = Decoder(config, scan_layers=True, remat=remat).apply({"params": params}, tokens)
            return jnp.sum(jnp.square(hidden))
        compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
        sizes[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert sizes["block"] < sizes["attention"] < sizes["ffn"] < sizes["none"], sizes


def test_every_saved_name_occurs(params):
    """`save_only_these_names` is silent about a name that does not exist."""
    jaxpr = str(jax.make_jaxpr(lambda params: Decoder(CONFIG).apply({"params": params}, draw_tokens(1, 8))[0])(params))
    for name in SAVED_NAMES:
        assert f"name={name}" in jaxpr


def test_remat_does_not_change_gradients(params):
    tokens = draw_tokens(2, 32)

    def loss(params, remat):
        return jnp.sum(jnp.square(Decoder(CONFIG, remat=remat).apply({"params": params}, tokens)[0]))

    plain = jax.tree.leaves(jax.grad(partial(loss, remat="none"))(params))
    for remat in ("ffn", "attention", "block"):
        for ours, other in zip(jax.tree.leaves(jax.grad(partial(loss, remat=remat))(params)), plain, strict=True):
            np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())
    with pytest.raises(ValueError, match="must be one of none, ffn, attention, block"):
        loss(params, "everything")


def test_bfloat16_is_close_and_stays_bfloat16(params):
    tokens = draw_tokens(2, 32)
    hidden, _ = Decoder(CONFIG, dtype=jnp.bfloat16).apply({"params": params}, tokens)
    assert hidden.dtype == jnp.bfloat16
    exact, _ = Decoder(CONFIG).apply({"params": params}, tokens)
    np.testing.assert_allclose(hidden.astype(np.float32), exact, atol=0.1)
