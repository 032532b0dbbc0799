"""Runs cut to a budget."""

import pytest
import yaml

from ctllm_jax import cli
from ctllm_jax.cluster.topology import parse_topology
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.load import load
from ctllm_jax.config.plan import PlanConfig
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.model.flops import flops_per_token
from ctllm_jax.preflight.budget import fit


def plan(target, *overrides):
    config = load(PlanConfig, target=target, overrides=overrides)
    return config, fit(config, parse_topology(config.topology))


def test_tokens_are_whole_steps():
    config, found = plan("small/1b", "budget=2B", "topology=h100:8")
    assert found.tokens == found.steps * config.batch.tokens <= 2e9 < found.tokens + config.batch.tokens


def test_hours_are_what_the_chips_do_in_them():
    config, found = plan("ct_llm_2b/pretrain", "budget=36h", "topology=v5p-256", "mfu=0.5")
    flops = flops_per_token(config.model, sequence_length=4096).causal
    assert found.tokens * flops / (459e12 * 128 * 0.5) == pytest.approx(found.seconds) and found.seconds <= 36 * 3600
    assert found.seconds + found.seconds / found.steps > 36 * 3600


def test_a_short_run_warms_up_and_falls_in_its_own_length():
    _, found = plan("ct_llm_2b/pretrain", "budget=1B", "topology=v5p-256")
    assert found.overrides["optimizer.warmup_steps"] == round(0.05 * found.steps)
    assert found.overrides["checkpoint.every"] <= found.steps
    _, found = plan("quickstart/pretrain", "budget=1M", "topology=h100:1")
    assert found.overrides["optimizer.decay_steps"] == round(0.2 * found.steps)
    _, found = plan("ct_llm_2b/pretrain", "budget=2T", "topology=v5p-256")
    assert "optimizer.warmup_steps" not in found.overrides


def test_too_small_a_budget_says_what_the_least_is():
    with pytest.raises(UserError, match=r"budget=1M: that is 0 steps of 2,097,152 tokens; 10 take 20,971,520 tokens"):
        plan("ct_llm_2b/pretrain", "budget=1M", "topology=v5p-256")


@pytest.mark.parametrize("budget", ["36", "0h", "h", "-3h", "4 weeks"])
def test_a_budget_that_is_none(budget, capsys):
    assert cli.main(["plan", "small/1b", f"budget={budget}", "topology=h100:8"]) == 2
    assert "must be time (36h, 90min, 3d) or tokens" in capsys.readouterr().err


def test_what_is_written_is_a_config(tmp_path, capsys):
    path = tmp_path / "runs" / "plan.yaml"
    assert cli.main(["plan", "ct_llm_2b/pretrain", "budget=40B", "topology=v5p-256", f"output={path}", "price=4",
                     "optimizer.lr=1e-4"]) == 0
    out = capsys.readouterr().out
    assert f"next: python launch.py pretrain {path} optimizer.lr=1e-4" in out
    tree = yaml.safe_load(path.read_text())
    config = load(PretrainConfig, target=path)
    assert config.steps == tree["steps"] and config.optimizer.warmup_steps == tree["optimizer"]["warmup_steps"]
    assert config.tokens_at(config.steps) <= 40e9
