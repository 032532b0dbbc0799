"""DPO through the shared step: what adds up on any mesh, split and packing; and the reference that is kept."""

import json
import random

import jax
import numpy as np
import pytest

from ctllm_jax.config.dpo import DPOConfig, PairDataConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data.preference import PreferenceData
from ctllm_jax.data.templates import open_template
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.losses.preference import KINDS
from ctllm_jax.model.decoder import init_params
from ctllm_jax.training import reference
from ctllm_jax.training.checkpoints.checkpoint import Kept
from ctllm_jax.training.dpo import check_loss, describe, make_loss_fn, make_objective
from ctllm_jax.training.reference import attach_reference
from ctllm_jax.training.run import make_decoder
from data_prep.train_tokenizer import fit
from tests.training.steps import SPLITS, assert_same, assert_same_gradients, on_mesh, take_steps

ROWS, S = 8, 128
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

    def load_data(*groups, **changes):
        config = PairDataConfig(sources={group: {"path": str(folder / f"{group}.jsonl")}
                                         for group in groups or ("zh", "en")}, **changes)
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
                        lambda model: (None, Kept(7, "resumable", None, known["meta"])))
    monkeypatch.setattr(reference, "load_params", lambda kept, abstract: jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), known["params"], abstract))
    return known


def run(config, data, params, **options):
    return take_steps(config, data, params, make_objective(data).make_loss_fn, **options)


@pytest.fixture(scope="module")
def one_device(load_data, params):
    return run(make_config(), load_data(), params)


@pytest.mark.parametrize(("sizes", "accumulation"), SPLITS)
def test_every_mesh_and_split_gives_the_same(one_device, load_data, params, sizes, accumulation):
    assert min(metrics["pairs"] for metrics in one_device.history) > ROWS
    assert_same(run(make_config(), load_data(), params, mesh_sizes=on_mesh(sizes), accumulation=accumulation),
                one_device)


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

    packed = data.all_rows()[:4]
    assert max(map(len, packed)) > 1
    (loss, pairs), grads = total(packed)
    (alone, count), alone_grads = total([[pair] for pairs in packed for pair in pairs])
    assert pairs == count == sum(map(len, packed))
    assert loss == pytest.approx(float(alone), rel=1e-5)
    assert_same_gradients(grads, alone_grads)


def test_a_sum_without_a_name_of_trl_is_shown_too():
    sums = {"pairs": 4.0, "pairs/zh": 0.0, "rewards/margins": 2.0, "rewards/margins/zh": 0.0, "router": 6.0,
            "loss": 1.0, "weight": 4.0, "lr": 0.1, "grad_norm": 1.0, "skipped": 0.0, "bad_steps": 0.0}
    assert describe(sums) == {"pairs": 4.0, "rewards/margins": 0.5, "loss/router": 1.5}


def kept_in(folder):
    return f"data.reference={folder / 'reference.npz'}"


def test_the_first_loss_is_ln_2_and_what_is_preferred_is_learned(load_data, init, tmp_path):
    config, data = make_config("loss.beta=0.5", "batch.rows_per_device=2", kept_in(tmp_path)), load_data()
    found = attach_reference(config, data, make_objective(data), directory=tmp_path)
    assert found["how"] == "computed" and found["difference"] < 1e-5 and (data.reference_logps < 0).all()
    history = run(config, data, init["params"], steps=8).history
    assert history[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    means = [describe(metrics) for metrics in history]
    assert abs(means[0]["rewards/margins"]) < 1e-4
    assert means[-1]["rewards/margins"] > 0.5 and means[-1]["rewards/accuracies"] > 0.95
    for name in ("rewards/margins", "rewards/accuracies", "logps/chosen"):
        split = [means[-1][f"{name}/{group}"] * history[-1][f"pairs/{group}"] for group in ("zh", "en")]
        assert sum(split) == pytest.approx(history[-1]["pairs"] * means[-1][name], rel=1e-5)


def test_a_kept_reference_is_checked_and_used(load_data, init, tmp_path):
    config, data = make_config(kept_in(tmp_path)), load_data()
    attach_reference(config, data, make_objective(data), directory=tmp_path)
    again = load_data()
    found = attach_reference(config, again, make_objective(again), directory=tmp_path)
    assert found["how"] == "kept" and np.array_equal(again.reference_logps, data.reference_logps)
    assert again.fingerprint == data.fingerprint and again.fingerprint["reference"]["step"] == 7
    elsewhere = make_config(f"data.reference={tmp_path / 'other' / 'file.npz'}")
    assert attach_reference(elsewhere, again, make_objective(again), directory=tmp_path)["how"] == "computed"


@pytest.mark.parametrize(("changes", "message"), [
    ({"params": 1.05}, "nats a token from those that init=runs/quickstart-sft gives now"),
    ({"file": b"PK"}, "cannot be read"),
])
def test_a_wrong_reference_is_refused(load_data, init, tmp_path, changes, message):
    data = load_data()
    config = make_config(kept_in(tmp_path))
    attach_reference(config, data, make_objective(data), directory=tmp_path)
    if "params" in changes:
        init["params"] = jax.tree.map(lambda x: x * changes["params"], init["params"])
    if "file" in changes:
        (tmp_path / "reference.npz").write_bytes(changes["file"])
    with pytest.raises(UserError) as error:
        attach_reference(config, data, make_objective(data), directory=tmp_path)
    assert message in str(error.value) and "computed anew" in str(error.value)


def test_bfloat16_stores_the_bound_that_it_measured(load_data, init, tmp_path):
    config, data = make_config("compute.dtype=bfloat16", kept_in(tmp_path)), load_data()
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


def test_the_reference_of_held_out_pairs_is_kept_and_checked_with_the_others(load_data, init, tmp_path):
    whole, part = load_data(), load_data(held_out=0.3)
    assert 0 < part.report["held_out"] < len(part)
    attach_reference(make_config(), whole, make_objective(whole), directory=tmp_path)
    # The file is of all pairs: another share held out takes it as it is.
    found = attach_reference(make_config(), part, make_objective(part), directory=tmp_path)
    assert found["how"] == "kept" and found["difference"] < 1e-5
    again = load_data(held_out=0.3)
    attach_reference(make_config(), again, make_objective(again), directory=tmp_path / "anew")
    np.testing.assert_allclose(again.reference_logps, whole.reference_logps, rtol=1e-5)
