"""AdamW against PyTorch's, its schedules by hand, and rules that must hit something."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctllm_jax import sharding
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.model import ModelConfig
from ctllm_jax.config.pretrain import OptimizerConfig
from ctllm_jax.model.decoder import init_table
from ctllm_jax.model.parameters import decoder_parameters
from ctllm_jax.training.optimizer import assign_rules, describe_rules, make_optimizer, make_schedule
from ctllm_jax.training.state import init_state, like_params

PARAMS = {"embedding": jnp.ones((4, 3)), "blocks": {"gate": jnp.ones((2, 3, 5)), "ffn_norm": jnp.ones((2, 3)),
                                                    "query_bias": jnp.ones((2, 3, 4))}, "final_norm": jnp.ones(3)}


def rates(**keys):
    schedule = make_schedule(OptimizerConfig(lr=1.0, **keys), steps=100)
    return np.array([float(schedule(jnp.int32(step))) for step in range(100)])


def test_warmup_then_cosine_to_the_minimum():
    lr = rates(warmup_steps=10, min_lr=0.1)
    np.testing.assert_allclose(lr[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(lr[10:], 0.1 + 0.45 * (1 + np.cos(np.pi * np.arange(1, 91) / 90)), rtol=1e-5)
    assert lr[-1] == pytest.approx(0.1)


def test_warmup_stable_decay():
    lr = rates(schedule="wsd", warmup_steps=10, min_lr=0.0, decay_steps=20)
    assert np.all(lr[9:80] == 1) and lr[80] == pytest.approx(0.95) and lr[-1] == pytest.approx(0.0, abs=1e-6)
    assert np.sum(rates(schedule="wsd", min_lr=0.5) < 1) == 10


def test_constant():
    assert np.all(rates(schedule="constant", warmup_steps=5)[4:] == 1)


def test_decay_leaves_out_vectors_and_biases_although_they_are_stacked():
    treated = assign_rules(OptimizerConfig(lr=1), PARAMS)
    assert {name for name, how in treated.items() if how.decayed} == {"embedding", "blocks/gate"}


def test_the_first_rule_decides_and_the_table_tells():
    config = OptimizerConfig(lr=1, rules=[{"pattern": "embedding", "lr_multiplier": 0.1, "weight_decay": False},
                                          {"pattern": "e", "lr_multiplier": 2.0}])
    treated = assign_rules(config, PARAMS)
    assert treated["embedding"].lr_multiplier == 0.1 and not treated["embedding"].decayed
    assert treated["blocks/gate"].lr_multiplier == 2.0 and treated["blocks/gate"].decayed
    assert treated["blocks/ffn_norm"].lr_multiplier == 1.0
    assert ("embedding", "x 0.1", "none", "embedding") in describe_rules(config, PARAMS)


def test_a_rule_that_hits_nothing_is_refused():
    for rules in ([{"pattern": "blocks/gat$"}], [{"pattern": "."}, {"pattern": "gate"}]):
        with pytest.raises(UserError, match=r"decides for no parameter.*blocks/gate"):
            assign_rules(OptimizerConfig(lr=1, rules=rules), PARAMS)


def test_a_multiplier_of_zero_freezes():
    config = OptimizerConfig(lr=1, rules=[{"pattern": "embedding", "lr_multiplier": 0}])
    optimizer = make_optimizer(config, PARAMS)
    updates, _ = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
    assert np.all(np.asarray(updates["embedding"]) == 0) and np.all(np.asarray(updates["blocks"]["gate"]) != 0)


@pytest.mark.parity
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_updates_equal_torch(clip_norm):
    import torch

    config = OptimizerConfig(lr=1e-2, weight_decay=0.3, clip_norm=clip_norm)
    rng = np.random.default_rng(0)
    ours = {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "v": jnp.asarray(rng.normal(size=3), jnp.float32)}
    theirs = {name: torch.nn.Parameter(torch.tensor(np.array(value))) for name, value in ours.items()}
    groups = [{"params": [theirs["w"]], "weight_decay": 0.3}, {"params": [theirs["v"]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    optimizer = make_optimizer(config, ours)
    state = optimizer.init(ours)
    for _ in range(10):
        grads = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in ours.items()}
        direction, state = optimizer.update(jax.tree.map(jnp.asarray, grads), state, ours)
        ours = optax.apply_updates(ours, jax.tree.map(lambda d: -1e-2 * d, direction))
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[name])
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip_norm)
        adamw.step()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name].detach().numpy(), rtol=2e-5, atol=1e-6)


def lay_out(optimizer):
    """(state, its layout) of an optimizer for a small decoder, on fsdp = 8."""
    config = ModelConfig(vocab_size=256, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
                         ffn_size=128)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    table = decoder_parameters(config)
    params = jax.eval_shape(lambda key: init_table(table, key), jax.random.key(0))
    optimizer = optimizer(params)
    state = jax.eval_shape(lambda: init_state(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params), optimizer))
    return state, like_params(state, params, sharding.param_shardings(table, mesh), sharding.replicated(mesh))


@pytest.mark.parametrize("optimizer", [
    lambda params: optax.scale_by_adam(),
    lambda params: optax.chain(optax.clip(1.0), optax.partition(
        {"matrix": optax.scale_by_adam(), "other": optax.trace(0.9)},
        jax.tree.map(lambda x: "matrix" if x.ndim > 2 else "other", params))),
    lambda params: optax.masked(optax.scale_by_adam(), jax.tree.map(lambda x: x.ndim > 2, params)),
    lambda params: optax.MultiSteps(optax.inject_hyperparams(optax.adam)(1e-3), 2).gradient_transformation()],
    ids=["adam", "partition", "masked", "multi_steps"])
def test_optimizer_state_is_split_like_the_parameters_it_belongs_to(optimizer):
    state, layout = lay_out(optimizer)
    for (path, leaf), split in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(layout), strict=True):
        name = jax.tree_util.keystr(path)
        assert split.is_fully_replicated == (leaf.size == 1 or "norm" in name), name


def test_optimizer_state_that_every_device_would_hold_whole_is_refused_by_name():
    whole = optax.stateless(lambda updates, _: updates)._replace(init=lambda params: {"basis": jnp.zeros((1024, 1024))})
    with pytest.raises(UserError, match=r"opt_state/basis \[1024, 1024\] belongs to no parameter.* 4 MiB"):
        lay_out(lambda params: whole)
