"""DPO through the shared step: what adds up on any mesh, split and packing; and the reference that is kept."""

import json
import random
from functools import partial

import jax
import numpy as np
import pytest

from ctllm_jax import sharding
from ctllm_jax.config.dpo import DPOConfig, PairDataConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data.chat import open_template
from ctllm_jax.data.preference import PreferenceData
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.losses.preference import KINDS
from ctllm_jax.model.decoder import init_params
from ctllm_jax.model.parameters import decoder_parameters
from ctllm_jax.training import reference
from ctllm_jax.training.checkpoint import Kept
from ctllm_jax.training.dpo import check_loss, describe, make_loss_fn, make_objective
from ctllm_jax.training.optimizer import make_optimizer, make_schedule
from ctllm_jax.training.pretrain import make_decoder, place_batch
from ctllm_jax.training.reference import attach_reference
from ctllm_jax.training.state import init_state
from ctllm_jax.training.step import make_train_step
from data_prep.train_tokenizer import fit

ROWS, S = 8, 128
ONE = {"data": 1, "fsdp": 1, "tensor": 1}
GOOD, BAD = ["今天", "公园", "散步"], ["天气", "不错", "我们"]


def make_config(*overrides):
    config = load(DPOConfig, target="quickstart/dpo", overrides=[
        f"batch.sequence_length={S}", f"batch.tokens={ROWS * S}", "optimizer.schedule=constant", "optimizer.lr=1e-3",
        "warmup_ratio=null", "steps=4", "compute.scan_layers=true", *overrides])
    debug = load(PretrainConfig, target="debug/pretrain", overrides=["model.vocab_size=352", "model.init_std=0.2"])
    return config.model_copy(update={"model": debug.model})


@pytest.fixture(scope="module")
def load_data(tmp_path_factory):
    """Groups (default: zh and en) -> 30 pairs of each; chosen answers are of other words than rejected ones."""
    folder, draw = tmp_path_factory.mktemp("pairs"), random.Random(0)
    for group in ("zh", "en"):
        rows = [{"prompt": f"{index}？", **{side: "".join(draw.choices(words, k=draw.randint(1, 9)))
                                          for side, words in (("chosen", GOOD), ("rejected", BAD))}}
                for index in range(30)]
        (folder / f"{group}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    path = folder / "small.model"
    lines = ["".join(draw.choices([*GOOD, *BAD, "？", *"用户助手：0123456789"], k=20)) for _ in range(200)]
    path.write_bytes(fit(lines, vocab_size=300, character_coverage=1.0))
    tokenizer = load_tokenizer(path)
    template = open_template(TemplateConfig(kind="plain"), tokenizer)

    def load_data(*groups):
        config = PairDataConfig(sources={group: {"path": str(folder / f"{group}.jsonl")}
                                         for group in groups or ("zh", "en")})
        return PreferenceData(config, template=template, tokenizer=tokenizer,
                              sequence_length=S, context_length=S, rows=ROWS, seed=3, vocab_size=352)

    return load_data


@pytest.fixture(scope="module")
def params():
    return init_params(make_config().model, jax.random.key(0))


@pytest.fixture
def init(params, monkeypatch):
    """A checkpoint of these weights, as `find_checkpoint` and `load_params` would read it; they can be replaced."""
    known = {"params": params, "meta": {"fingerprint": {"config": {"seed": 1}}}}
    monkeypatch.setattr(reference, "find_checkpoint",
                        lambda model: (None, Kept(7, "resumable", None, known["meta"], 0)))
    monkeypatch.setattr(reference, "load_params", lambda kept, abstract: jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), known["params"], abstract))
    return known


def take_steps(config, data, params, *, mesh_sizes=ONE, accumulation=1, steps=2):
    """Metrics of each step and the final weights."""
    mesh = sharding.make_mesh(mesh_sizes, jax.devices()[:int(np.prod(list(mesh_sizes.values())))])
    shardings = sharding.param_shardings(decoder_parameters(config.model), mesh)
    placed = jax.device_put(params, shardings)
    optimizer = make_optimizer(config.optimizer, placed)
    step = jax.jit(make_train_step(
        make_objective(data).make_loss_fn(config, make_decoder(config, mesh), mesh), optimizer,
        make_schedule(config.optimizer, steps=config.steps), accumulation=accumulation,
        constrain_grads=partial(jax.lax.with_sharding_constraint, shardings=shardings)))
    state, history = init_state(placed, optimizer), []
    for _, batch in zip(range(steps), data.iterate(0, local_rows=range(ROWS)), strict=False):
        batch = place_batch(batch, sharding=sharding.batch_sharding(mesh), rows=ROWS)
        state, metrics = step(state, batch, None)
        history.append({name: float(value) for name, value in metrics.items()})
    return history, jax.device_get(state.params)


@pytest.fixture(scope="module")
def one_device(load_data, params):
    return take_steps(make_config(), load_data(), params)


@pytest.mark.parametrize(("sizes", "accumulation"), [((2, 2, 2), 1), ((2, 1, 1), 4)])
def test_every_mesh_and_split_gives_the_same(one_device, load_data, params, sizes, accumulation):
    got = take_steps(make_config(), load_data(), params, mesh_sizes=dict(zip(sharding.AXES, sizes, strict=True)),
                     accumulation=accumulation)
    for mine, theirs in zip(got[0], one_device[0], strict=True):
        assert mine.keys() == theirs.keys() and theirs["pairs"] > ROWS
        for name in theirs:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    for mine, theirs in zip(jax.tree.leaves(got[1]), jax.tree.leaves(one_device[1]), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sigmoid", "simpo"])
def test_packed_equals_unpacked(load_data, params, kind):
    """Loss and gradients of one batch of packed rows, and of a row for each of its pairs."""
    config, data = make_config(f"loss.kind={kind}"), load_data()
    data.reference_logps = np.random.default_rng(0).normal(-20, 3, 2 * len(data)).astype(np.float32)
    function = jax.jit(jax.value_and_grad(
        lambda params, batch: make_loss_fn(config, make_decoder(config), mesh=None)(params, None, batch)[:2],
        has_aux=True))

    def total(rows):
        batches = [data.pack(pairs) for pairs in rows]
        together = jax.tree.map(lambda *x: np.stack(x), *batches)
        return function(params, together)

    packed = [data.pairs_at(place) for place in range(4)]
    assert max(map(len, packed)) > 1
    (loss, pairs), grads = total(packed)
    (alone, count), alone_grads = total([[pair] for pairs in packed for pair in pairs])
    assert pairs == count == sum(map(len, packed))
    assert loss == pytest.approx(float(alone), rel=1e-5)
    for mine, other in zip(jax.tree.leaves(grads), jax.tree.leaves(alone_grads), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5 * np.abs(other).max())


def test_the_first_loss_is_ln_2_and_what_is_preferred_is_learned(load_data, init, tmp_path):
    config, data = make_config("loss.beta=0.5", "batch.rows_per_device=2"), load_data()
    found = attach_reference(config, data, make_objective(data), directory=tmp_path)
    assert found["how"] == "computed" and found["difference"] < 1e-5 and (data.reference_logps < 0).all()
    history, _ = take_steps(config, data, init["params"], steps=8)
    assert history[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    means = [describe(metrics) for metrics in history]
    assert abs(means[0]["rewards/margins"]) < 1e-4
    assert means[-1]["rewards/margins"] > 0.5 and means[-1]["rewards/accuracies"] > 0.95
    for name in ("rewards/margins", "rewards/accuracies", "logps/chosen"):
        split = [means[-1][f"{name}/{group}"] * history[-1][f"pairs/{group}"] for group in ("zh", "en")]
        assert sum(split) == pytest.approx(history[-1]["pairs"] * means[-1][name], rel=1e-5)


def test_a_kept_reference_is_checked_and_used(load_data, init, tmp_path):
    config, data = make_config(), load_data()
    attach_reference(config, data, make_objective(data), directory=tmp_path)
    again = load_data()
    found = attach_reference(config, again, make_objective(again), directory=tmp_path)
    assert found["how"] == "kept" and np.array_equal(again.reference_logps, data.reference_logps)
    assert again.fingerprint == data.fingerprint and again.fingerprint["reference"]["step"] == 7
    elsewhere = make_config(f"data.reference={tmp_path / 'other' / 'file.npz'}")
    assert attach_reference(elsewhere, again, make_objective(again), directory=tmp_path)["how"] == "computed"


@pytest.mark.parametrize(("overrides", "changes", "message"), [
    (["compute.dtype=bfloat16"], {}, "dtype: float32 in the file, bfloat16 now"),
    ([], {"sources": "zh"}, "pairs: "),
    ([], {"meta": {"fingerprint": {"config": {"seed": 2}}}}, "reference model: {'step': 7"),
    ([], {"params": 1.05}, "nats a token from those that init=runs/quickstart-sft gives now"),
    ([], {"file": b"PK"}, "cannot be read"),
])
def test_a_stale_or_wrong_reference_is_refused(load_data, init, tmp_path, overrides, changes, message):
    data = load_data()
    attach_reference(make_config(), data, make_objective(data), directory=tmp_path)
    if "sources" in changes:
        data = load_data(changes["sources"])
    if "params" in changes:
        init["params"] = jax.tree.map(lambda x: x * changes["params"], init["params"])
    if "file" in changes:
        (tmp_path / "reference.npz").write_bytes(changes["file"])
    init["meta"] = changes.get("meta", init["meta"])
    with pytest.raises(UserError) as error:
        attach_reference(make_config(*overrides), data, make_objective(data), directory=tmp_path)
    assert message in str(error.value) and "computed anew" in str(error.value)


def test_bfloat16_stores_the_bound_that_it_measured(load_data, init, tmp_path):
    config, data = make_config("compute.dtype=bfloat16"), load_data()
    found = attach_reference(config, data, make_objective(data), directory=tmp_path)
    assert found["tolerance"] >= max(1e-4, 2 * found["difference"])
    kept = attach_reference(config, data, make_objective(data), directory=tmp_path)
    assert kept["how"] == "kept" and kept["tolerance"] == found["tolerance"]


def test_the_kinds_of_the_config_are_those_of_the_loss():
    from typing import get_args

    from ctllm_jax.config.dpo import PreferenceLossConfig

    assert get_args(PreferenceLossConfig.model_fields["kind"].annotation) == tuple(KINDS)


@pytest.mark.parametrize(("overrides", "message"), [
    (["loss.kind=hinge", "loss.label_smoothing=0.1"], "'hinge' has no label_smoothing"),
    (["loss.kind=robust"], "'robust' needs label_smoothing"),
    (["loss.gamma=0.5"], "'sigmoid' has no gamma"),
])
def test_options_that_would_be_ignored_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        check_loss(make_config(*overrides).loss)
