"""Held-out preferences, against a pass over each answer alone and DPO's formula written out."""

import jax
import numpy as np
import pytest

from ctllm_jax import sharding
from ctllm_jax.evaluation.bits_per_byte import make_evaluation_step
from ctllm_jax.evaluation.preferences import evaluate_pairs
from ctllm_jax.model.decoder import Decoder, head_weights
from ctllm_jax.training.dpo import describe, make_objective
from ctllm_jax.training.run import make_decoder, place_batch
from tests.training.test_dpo import load_data, make_config, params  # noqa: F401

ROWS = 4


def answer_logp(model, weights, ids, learned):
    hidden_SD, _ = Decoder(model).apply({"params": weights}, ids[None])
    logits_SV = np.asarray(hidden_SD, np.float64)[0] @ np.asarray(head_weights(weights), np.float64)
    logits_SV = logits_SV[:, :model.vocab_size]
    logps_SV = logits_SV - np.log(np.exp(logits_SV).sum(axis=1, keepdims=True))
    return sum(logps_SV[place - 1, ids[place]] for place in np.flatnonzero(learned))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 1)])
def test_every_figure_is_that_of_the_pairs_one_by_one(load_data, params, sizes):  # noqa: F811
    config, data = make_config("loss.beta=0.5"), load_data(held_out=0.25)
    draw = np.random.default_rng(0)
    data.reference_logps = draw.normal(-20, 3, 2 * len(data)).astype(np.float32)
    sources = data.held_out(rows=ROWS, split="", max_tokens=10**9)
    mesh = sharding.make_mesh(dict(zip(sharding.AXES[-len(sizes):], sizes, strict=True)),
                              jax.devices()[:int(np.prod(sizes))])
    step = make_evaluation_step(make_objective(data).make_loss_fn(config, make_decoder(config, mesh), mesh),
                                out_sharding=sharding.replicated(mesh))
    found = evaluate_pairs(step, params, sources, describe=describe, place=lambda batch: place_batch(
        batch, sharding=sharding.batch_sharding(mesh), rows=ROWS))

    apart = [pair for row in data.all_rows()[data.rows_per_epoch:] for pair in row]
    rewards, owners, logps = [], [], []
    for pair in apart:
        both = []
        for answer in (2 * pair, 2 * pair + 1):
            here = slice(*data.answers.offsets[answer:answer + 2])
            both.append(answer_logp(config.model, params, data.answers.ids[here], data.answers.weights[here]))
        logps.append(both)
        rewards.append([0.5 * (logp - data.reference_logps[2 * pair + side]) for side, logp in enumerate(both)])
        owners.append("zh" if data.answers.sources[2 * pair] == 0 else "en")
    rewards, logps, owners = np.array(rewards), np.array(logps), np.array(owners)
    margins = rewards[:, 0] - rewards[:, 1]
    for group, mine, chosen in [("", found, np.ones(len(apart), bool)), ("/zh", found, owners == "zh"),
                                ("/en", found, owners == "en"), ("", found["sources"]["zh"], owners == "zh")]:
        expected = {"rewards/chosen": rewards[chosen, 0].mean(), "rewards/rejected": rewards[chosen, 1].mean(),
                    "rewards/margins": margins[chosen].mean(), "rewards/accuracies": (margins[chosen] > 0).mean(),
                    "logps/chosen": logps[chosen, 0].mean(), "logps/rejected": logps[chosen, 1].mean()}
        assert {name: mine[name + group] for name in expected} == pytest.approx(expected, rel=1e-4)
        if not group:
            assert mine["loss"] == pytest.approx(np.log1p(np.exp(-margins[chosen])).mean(), rel=1e-4)
            assert mine["pairs"] == chosen.sum()
    assert set(found["sources"]) == {"zh", "en"} and not any("/zh" in name for name in found["sources"]["zh"])


def test_nothing_held_out_says_nothing():
    assert evaluate_pairs(None, None, {}, place=None, describe=None) == {"sources": {}}
