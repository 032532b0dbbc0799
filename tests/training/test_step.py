"""The train step: what adds up, on any mesh and any split; and a curve that PyTorch draws too."""

import functools
import itertools
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctllm_jax import sharding
from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.data.batch import Batch
from ctllm_jax.data.synthetic import SyntheticData
from ctllm_jax.gathered import Rings
from ctllm_jax.losses import cross_entropy
from ctllm_jax.model.decoder import init_params
from ctllm_jax.model.parameters import decoder_parameters
from ctllm_jax.training.objective import make_loss_fn, next_tokens
from ctllm_jax.training.optimizer import make_optimizer, make_schedule
from ctllm_jax.training.records import make_record
from ctllm_jax.training.run import make_decoder, place_batch
from ctllm_jax.training.state import init_state
from ctllm_jax.training.step import make_train_step, plan_accumulation
from tests.training.steps import place_state


def make_config(*overrides):
    return load(PretrainConfig, target="debug/pretrain",
                overrides=["model.num_kv_heads=4", "loss.z_loss=1e-3", *overrides])


@functools.cache
def init_params_once(model):
    return jax.device_get(jax.jit(partial(init_params, model))(jax.random.key(0)))


def take_steps(config, *, mesh_sizes, accumulation=1, steps=3):
    """Metrics of each step and the final weights, on a mesh of as many devices as the sizes multiply to."""
    mesh = sharding.make_mesh(mesh_sizes, jax.devices()[:int(np.prod(list(mesh_sizes.values())))])
    data = SyntheticData(sequence_length=config.batch.sequence_length, rows=config.batch.rows, seed=1,
                         vocab_size=config.model.vocab_size)
    shardings = sharding.param_shardings(decoder_parameters(config.model), mesh)
    params = jax.device_put(init_params_once(config.model), shardings)
    optimizer = make_optimizer(config.optimizer, params)
    state, layout = place_state(params, optimizer, shardings=shardings, mesh=mesh)
    step = jax.jit(make_train_step(
        make_loss_fn(config, make_decoder(config, mesh), mesh=mesh, token_bytes=None, z_loss=config.loss.z_loss,
                     padded=True),
        optimizer, make_schedule(config.optimizer, steps=config.steps), accumulation=accumulation,
        constrain_grads=partial(jax.lax.with_sharding_constraint, shardings=shardings)), out_shardings=layout)
    history = []
    for _, batch in zip(range(steps), data.iterate(0, local_rows=range(config.batch.rows)), strict=False):
        batch = place_batch(batch, sharding=sharding.batch_sharding(mesh), rows=config.batch.rows)
        state, metrics = step(state, batch, None)
        history.append({name: float(value) for name, value in metrics.items()})
    return history, jax.device_get(state.params)


@pytest.fixture(scope="module")
def one_device():
    return take_steps(make_config(), mesh_sizes={"data": 1, "fsdp": 1, "tensor": 1})


def assert_same(ours, other):
    for mine, theirs in zip(ours[0], other[0], strict=True):
        for name in theirs:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name
    for mine, theirs in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(other[1]), strict=True):
        # Adam divides by the root of a tiny second moment in the first steps: 1e-5 of the step, not of the weight.
        np.testing.assert_allclose(mine, theirs, atol=2e-4, rtol=1e-4)


COMMON = [(1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 4), (1, 2, 2, 2), (2, 1, 2, 2), (1, 4, 2, 1)]
ALL = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8 and sizes[3] <= 4]


@pytest.mark.parametrize("sizes", [*COMMON, *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ALL
                                              if sizes not in COMMON)], ids=str)
def test_every_mesh_gives_the_same(one_device, sizes):
    mesh_sizes = dict(zip(sharding.AXES, sizes, strict=True))
    assert_same(take_steps(make_config(), mesh_sizes=mesh_sizes), one_device)


def test_the_first_weights_do_not_depend_on_the_mesh():
    config = make_config().model
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, (1, 2, 2, 2), strict=True)), jax.devices())
    shardings = sharding.param_shardings(decoder_parameters(config), mesh)
    params = jax.jit(partial(init_params, config), out_shardings=shardings)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), init_params_once(config))


@pytest.mark.parametrize(("sizes", "rings"), [((1, 1, 8, 1), (2, 4)), ((1, 2, 2, 2), (2,))], ids=str)
def test_gradients_that_go_around_rings_are_the_same(one_device, monkeypatch, sizes, rings):
    """As on a torus of TPUs: no reduce-scatter then, but blocks from neighbor to neighbor, both ways."""
    for module in (sharding, cross_entropy):
        monkeypatch.setattr(module, "find_rings", lambda mesh, axis, how: Rings(rings, gathers=True))
    mesh_sizes = dict(zip(sharding.AXES, sizes, strict=True))
    assert_same(take_steps(make_config(), mesh_sizes=mesh_sizes), one_device)


@pytest.mark.parametrize(("devices", "accumulation"), [(1, 8), (1, 2), (2, 4), (4, 2)])
def test_every_split_into_micro_batches_gives_the_same(one_device, devices, accumulation):
    mesh_sizes = {"data": devices, "fsdp": 1, "tensor": 1}
    assert_same(take_steps(make_config(), mesh_sizes=mesh_sizes, accumulation=accumulation), one_device)


def test_scan_remat_and_chunks_do_not_matter(one_device):
    config = make_config("compute.scan_layers=false", "compute.remat=attention", "compute.loss_chunk=100")
    assert_same(take_steps(config, mesh_sizes={"data": 1, "fsdp": 1, "tensor": 1}), one_device)


def test_weights_count_tokens_not_micro_batches():
    """Σ loss / Σ weight over the batch, although one micro-batch has a single weighted token (transformers #35207)."""
    def loss_fn(params, frozen, batch):
        return jnp.sum(params["w"] * batch.tokens * batch.loss_weights), jnp.sum(batch.loss_weights), {}

    config = make_config().optimizer
    params = {"w": jnp.float32(1.0)}
    optimizer = make_optimizer(config, params)
    tokens = jnp.asarray([[1.0, 1, 1, 1], [5.0, 0, 0, 0]])
    weights = jnp.asarray([[1.0, 1, 1, 1], [1.0, 0, 0, 0]])
    batch = Batch(tokens, tokens, weights, tokens, tokens)
    for accumulation in (1, 2):
        step = make_train_step(loss_fn, optimizer, lambda step: jnp.float32(0.1), accumulation=accumulation)
        _, metrics = step(init_state(params, optimizer), batch)
        assert float(metrics["loss"]) == pytest.approx(9 / 5) and float(metrics["grad_norm"]) == pytest.approx(9 / 5)


def test_a_batch_without_a_weight_changes_nothing_to_nan():
    config = make_config()
    params = init_params(config.model, jax.random.key(0))
    optimizer = make_optimizer(config.optimizer, params)
    zeros = jnp.zeros((2, 64), jnp.int32)
    batch = Batch(zeros, zeros, jnp.zeros((2, 64)), zeros, zeros)
    loss_fn = make_loss_fn(config, make_decoder(config), mesh=None, token_bytes=None, z_loss=0.0, padded=True)
    step = make_train_step(loss_fn, optimizer, make_schedule(config.optimizer, steps=10))
    state, metrics = jax.jit(step)(init_state(params, optimizer), batch, None)
    assert float(metrics["loss"]) == 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


def take_a_step_that_sums(name):
    """Metrics of a step whose loss returns one more sum, over rows of one and three tokens."""
    def loss_fn(params, frozen, batch):
        return jnp.sum(params["w"] * batch), jnp.sum(batch), {name: 2.0 * jnp.sum(batch)}

    params = {"w": jnp.ones(())}
    config = make_config().optimizer
    optimizer = make_optimizer(config, params)
    step = make_train_step(loss_fn, optimizer, make_schedule(config, steps=10), accumulation=2)
    _, metrics = jax.jit(step)(init_state(params, optimizer), jnp.array([1.0, 3.0]), None)
    return {name: float(value) for name, value in metrics.items()}


def test_a_sum_of_a_loss_that_no_stage_knows_is_in_the_record():
    config = make_config()
    data = SyntheticData(sequence_length=64, rows=8, seed=1, vocab_size=250)
    record = make_record(SimpleNamespace(config=config, data=data, objective=next_tokens(), start=0))
    shown = record(1, take_a_step_that_sums("router"), {"step_seconds": 1.0, "data_wait": 0.0})
    assert shown["loss/router"] == 2.0
    assert not {"loss/weight", "loss/lr", "loss/z_loss", "loss/bytes"} & shown.keys()


@pytest.mark.parametrize("name", ["loss", "lr", "bad_steps"])
def test_a_sum_that_would_replace_a_metric_of_the_step_is_refused(name):
    with pytest.raises(ValueError, match=f"sums named {name}, as metrics of the train step are named"):
        take_a_step_that_sums(name)


def test_plan_of_accumulation():
    assert plan_accumulation(512, devices=256, rows_per_device=4) == (2, 1)
    assert plan_accumulation(512, devices=8, rows_per_device=4) == (4, 16)
    assert plan_accumulation(512, devices=8, rows_per_device=3) == (2, 32)
    assert plan_accumulation(8, devices=8, rows_per_device=None) == (1, 1)
    with pytest.raises(ValueError, match=r"batch of 512 rows cannot be split over 6 devices"):
        plan_accumulation(512, devices=6, rows_per_device=None)
    with pytest.raises(ValueError, match=r"set batch.tokens to 256 \* batch.sequence_length, or raise mesh.tensor"):
        plan_accumulation(64, devices=256, rows_per_device=None)


@pytest.mark.parity
def test_thirty_steps_draw_the_curve_that_torch_draws():
    """Same weights, same batches, AdamW with decay, warm-up, cosine and clipping: losses equal to 1e-3."""
    import torch

    from tests.model.llama import make_llama

    config = make_config("steps=30", "optimizer.warmup_steps=5", "loss.z_loss=0", "model.tie_embeddings=true",
                         "data.isolate_documents=false", "optimizer.clip_norm=0.7")
    data = SyntheticData(sequence_length=64, rows=8, seed=1, vocab_size=250, isolate_documents=False)
    params = init_params(config.model, jax.random.key(0))
    llama = make_llama(config.model, params).train()
    decayed = [parameter for parameter in llama.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in llama.parameters() if parameter.ndim < 2]
    adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                              lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    schedule = make_schedule(config.optimizer, steps=30)
    optimizer = make_optimizer(config.optimizer, params)
    step = jax.jit(make_train_step(make_loss_fn(config, make_decoder(config), mesh=None, token_bytes=None, z_loss=0.0,
                                                padded=False), optimizer, schedule))
    state, ours, theirs = init_state(params, optimizer), [], []
    for index, batch in zip(range(30), data.iterate(0, local_rows=range(8)), strict=False):
        state, metrics = step(state, batch, None)
        ours.append(float(metrics["loss"]))
        logits = llama(torch.tensor(batch.tokens).long()).logits[..., :250]
        targets = torch.tensor(batch.targets).long().reshape(-1)
        losses = torch.nn.functional.cross_entropy(logits.reshape(-1, 250), targets, reduction="none")
        weights = torch.tensor(batch.loss_weights).reshape(-1)
        loss = (losses * weights).sum() / weights.sum()
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 0.7)
        for group in adamw.param_groups:
            group["lr"] = float(schedule(jnp.int32(index)))
        adamw.step()
        theirs.append(loss.item())
    assert ours[-1] < ours[0] - 0.5
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
