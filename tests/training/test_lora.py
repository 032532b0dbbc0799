"""Training of adapters: what is trained and what it costs, on any mesh and split; and the steps that PEFT takes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctllm_jax import sharding
from ctllm_jax.config.load import ConfigError, load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.data.synthetic import SyntheticData
from ctllm_jax.model.decoder import init_params
from ctllm_jax.model.flops import flops_per_token
from ctllm_jax.model.lora import attach, count_adapters
from ctllm_jax.training.environment import choose_implementations
from ctllm_jax.training.objective import make_loss_fn
from ctllm_jax.training.run import make_decoder, place_batch, plan_step

STEPS = 3


def make_config(*overrides):
    return load(PretrainConfig, target="debug/pretrain", overrides=[
        "model.num_kv_heads=4", "model.init_std=0.1", "init=base", "lora.rank=4", "lora.alpha=8", *overrides])


def make_plan(config, sizes=(1, 1, 1)):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES[-len(sizes):], sizes, strict=True)),
                              jax.devices()[:int(np.prod(sizes))])
    return plan_step(config, mesh), mesh


def make_base(config, plan):
    """Random weights as the base, on the mesh and in the dtypes that it is kept in."""
    return jax.tree.map(lambda x, like: jax.device_put(x.astype(like.dtype), like.sharding),
                        init_params(config.model, jax.random.key(7)), plan.abstract_frozen)


def make_batches(config, mesh):
    data = SyntheticData(sequence_length=config.batch.sequence_length, rows=config.batch.rows, seed=1,
                         vocab_size=config.model.vocab_size, isolate_documents=config.isolated)
    place = partial(place_batch, sharding=sharding.batch_sharding(mesh), rows=config.batch.rows)
    return [place(batch) for _, batch in zip(range(STEPS), data.iterate(0, local_rows=range(config.batch.rows)),
                                             strict=False)]


def take_steps(config, sizes=(1, 1, 1)):
    """Metrics of each step, the adapters at the end, and the plan."""
    plan, mesh = make_plan(config, sizes)
    state, base, step, history = plan.init(jax.random.key(0)), make_base(config, plan), plan.compile(), []
    for batch in make_batches(config, mesh):
        state, metrics = step(state, batch, base)
        history.append({name: float(value) for name, value in metrics.items()})
    return history, jax.device_get(state.params), plan


@pytest.fixture(scope="module")
def one_device():
    return take_steps(make_config())


@pytest.mark.parametrize(("sizes", "overrides"), [
    ((2, 2, 2), []), ((1, 4, 2), ["batch.rows_per_device=1", "compute.remat=block"]),
    ((2, 1, 1), ["batch.rows_per_device=1", "compute.scan_layers=false", "compute.remat=attention"])], ids=str)
def test_every_mesh_and_split_gives_the_same(one_device, sizes, overrides):
    history, adapters, _ = take_steps(make_config(*overrides), sizes)
    for mine, theirs in zip(history, one_device[0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    for mine, theirs in zip(jax.tree.leaves(adapters), jax.tree.leaves(one_device[1]), strict=True):
        # Adam divides by the root of a tiny second moment in the first steps: 1e-5 of the step, not of the weight.
        np.testing.assert_allclose(mine, theirs, atol=2e-4, rtol=1e-4)


def test_adapters_alone_are_trained(one_device):
    history, adapters, plan = one_device
    config = make_config()
    trained = count_adapters(config.model, config.lora)
    for tree, copies in ((plan.abstract_state.params, 1), (plan.abstract_state.opt_state, 2)):
        sizes = [leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim]
        assert sum(sizes) == copies * trained and max(sizes) < 2 * 32 * 96
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(np.any(adapter["b"]) for adapter in adapters["blocks"].values())


def test_the_first_loss_is_the_bases(one_device):
    config = make_config()
    plan, mesh = make_plan(config)
    loss_fn = make_loss_fn(config, make_decoder(config), mesh=None, token_bytes=None, z_loss=0.0, padded=True)
    loss, weight, _ = jax.jit(loss_fn)(make_base(config, plan), None, make_batches(config, mesh)[0])
    assert float(loss * (1.0 / weight)) == one_device[0][0]["loss"]


def test_bfloat16_changes_no_number_of_the_base():
    """Its matrices are halved, and its vectors, which the forward pass takes in float32, are not."""
    config = make_config("compute.dtype=bfloat16")
    plan, mesh = make_plan(config)
    dtypes = {leaf.ndim: leaf.dtype for leaf in jax.tree.leaves(plan.abstract_frozen)}
    assert plan.abstract_frozen["blocks"]["query"].dtype == plan.abstract_frozen["head"].dtype == jnp.bfloat16
    assert dtypes[1] == plan.abstract_frozen["blocks"]["ffn_norm"].dtype == jnp.float32
    loss_fn = make_loss_fn(config, make_decoder(config), mesh=None, token_bytes=None, z_loss=0.0, padded=True)
    adapters = jax.tree.map(lambda x: x + 0.01, plan.init(jax.random.key(0)).params)
    whole = init_params(config.model, jax.random.key(7))

    @partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    def gradients(adapters, base):
        return jax.value_and_grad(lambda adapters: loss_fn(attach(base, adapters, scale=2.0), None, batch)[0])(adapters)

    batch = make_batches(config, mesh)[0]
    for ours, other in zip(jax.tree.leaves(gradients(adapters, make_base(config, plan))),
                           jax.tree.leaves(gradients(adapters, whole)), strict=True):
        assert np.array_equal(ours, other)


def test_a_step_costs_less_memory_and_arithmetic():
    """By the compiled step: neither gradients nor moments of frozen weights, in any form."""
    shape = ("model.hidden_size=128", "model.ffn_size=512", "model.head_dim=32", "model.vocab_size=2048",
             "compute.scan_layers=false", "compute.dtype=bfloat16")
    compiled = {}
    for name, more in (("full", "lora=null"), ("lora", "lora.rank=4")):
        config = make_config(*shape, more)
        plan, _ = make_plan(config)
        step = plan.compile()
        compiled[name] = step.memory_analysis(), step.cost_analysis()["flops"]
        flops = flops_per_token(config.model, sequence_length=64, lora=config.lora).full * config.batch.tokens
        compiled[name] += (flops,)
    full, lora = compiled["full"], compiled["lora"]
    assert lora[0].temp_size_in_bytes < full[0].temp_size_in_bytes
    # Weights in half the bytes, and no moments: a sixth of three float32 copies, and adapters.
    assert lora[0].argument_size_in_bytes < 0.25 * full[0].argument_size_in_bytes
    assert full[1] - lora[1] == pytest.approx(full[2] - lora[2], rel=0.1)


def test_what_a_config_is_told_at_once(tmp_path):
    for overrides, message in ((["init=null"], "lora needs init"), (["lora.targets=(query"], "no regular expression"),
                               (["lora.rank=0"], "must be >= 1"), (["lora.alhpa=3"], "did you mean lora.alpha")):
        with pytest.raises(ConfigError, match=message):
            make_config(*overrides)


def test_a_fused_swiglu_cannot_take_adapters(monkeypatch):
    monkeypatch.setattr("ctllm_jax.training.environment.chosen_swiglu", lambda named, **where: named)
    assert choose_implementations(make_config())["swiglu"] == "xla"
    with pytest.raises(ValueError, match="compute.swiglu=pallas takes gate and up as they are"):
        choose_implementations(make_config("compute.swiglu=pallas"))
    assert choose_implementations(make_config("compute.swiglu=pallas", "lora.targets=query"))["swiglu"] == "pallas"


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks transformers
@pytest.mark.parametrize(("overrides", "options"), [
    ([], {}), (["lora.targets=query$|value$|down", "lora.rslora=true", "optimizer.clip_norm=null"],
              {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True})], ids=["all", "rslora"])
def test_steps_are_those_of_peft_and_torch(overrides, options):
    import peft
    import torch

    from ctllm_jax.huggingface.peft import to_peft
    from tests.model.llama import make_llama

    config = make_config("optimizer.schedule=constant", "optimizer.warmup_steps=0", "optimizer.min_lr=0",
                         "optimizer.lr=3e-3", "data.isolate_documents=false", *overrides)
    plan, mesh = make_plan(config)
    state, base, step = plan.init(jax.random.key(0)), make_base(config, plan), plan.compile()
    llama = peft.get_peft_model(make_llama(config.model, jax.device_get(base)), peft.LoraConfig(**{
        "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0, **options}))
    tensors = {name: torch.tensor(value) for name, value in to_peft(jax.device_get(state.params)["blocks"]).items()}
    loaded = peft.set_peft_model_state_dict(llama, tensors)
    assert not loaded.unexpected_keys and not [key for key in loaded.missing_keys if "lora" in key]
    trained = [parameter for parameter in llama.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == count_adapters(config.model, config.lora)
    adamw = torch.optim.AdamW(trained, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=config.optimizer.weight_decay)
    for batch in make_batches(config, mesh):
        state, metrics = step(state, batch, base)
        logits = llama(torch.tensor(np.array(batch.tokens)).long()).logits[..., :config.model.vocab_size]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), torch.tensor(np.array(batch.targets)).long(),
                                                   reduction="none")
        weights = torch.tensor(np.array(batch.loss_weights))
        loss = (losses * weights).sum() / weights.sum()
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip_norm or 1e9)
        adamw.step()
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)
    theirs = peft.get_peft_model_state_dict(llama)
    for name, value in to_peft(jax.device_get(state.params)["blocks"]).items():
        np.testing.assert_allclose(value, theirs[name].detach().numpy(), atol=1e-2 * 3e-3, rtol=1e-4, err_msg=name)
