"""A finished run that gets more steps: both learning rates are told, and the step from which it is better to go on."""

import os
import shlex
import sys

import numpy as np
import pytest

from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.training.extension import describe_jump, rates_at
from ctllm_jax.training.optimizer import make_schedule
from tests.runs import DEBUG

WSD = ("optimizer.schedule=wsd", "optimizer.decay_steps=20", "optimizer.lr=1e-3", "optimizer.min_lr=0")


@pytest.fixture
def told(monkeypatch, tmp_path):
    """`(kept steps, at, before, *overrides) -> the message`, of a run in `tmp_path` that was started by pretrain."""
    monkeypatch.setattr(sys, "argv", ["launch.py", "pretrain", "my config.yaml", "steps=200", "run.dir=runs/old"])

    def tell(kept, at, before, *overrides):
        # Nothing else: a step that was copied, as the message says, lies in a folder without a config.yaml.
        for step in kept:
            (tmp_path / f"checkpoints/{step}").mkdir(parents=True, exist_ok=True)
        config = load(PretrainConfig, target=DEBUG, overrides=overrides)
        return describe_jump(config, run_dir=tmp_path, step=at, before=before)

    return tell


def test_a_finished_wsd_run_goes_on_better_before_its_decay(told, tmp_path):
    text = told([60, 80, 90, 100], 100, 100, *WSD, "steps=200")
    assert "the last update, of step 100, had 0, and the next one will have 0.001" in text
    assert "because steps=200 replaces steps=100" in text
    # The decay of the old run is of steps 81 to 100: 80 is the newest step before it.
    assert "go on from step 80 in another run directory, where the last update had 0.001 and the next one" in text
    *_, copy, command = text.splitlines()
    assert shlex.split(command)[:3] == ["python", "launch.py", "pretrain"] and "'my config.yaml' steps=200" in command
    assert "runs/old" not in command and command.endswith(f"run.dir={tmp_path}-from-80")
    (tmp_path / "checkpoints/80/params").mkdir(parents=True)
    assert os.system(copy) == 0
    assert (tmp_path.with_name(f"{tmp_path.name}-from-80") / "checkpoints/80/params").is_dir()


def test_a_finished_cosine_run_goes_on_where_the_two_curves_are_nearest(told):
    text = told([25, 50, 75, 100], 100, 100, "optimizer.lr=1e-3", "optimizer.min_lr=1e-4", "steps=200")
    assert "had 0.0001, and the next one will have 0.00055" in text
    assert "go on from step 25 in another run directory" in text


def test_where_no_earlier_step_is_kept_all_steps_are_trained_anew(told):
    text = told([100], 100, 100, *WSD, "steps=200")
    assert "no step before step 100 is kept" in text and text.endswith("-200-steps")


@pytest.mark.parametrize(("at", "before", "overrides"), [
    (100, 100, (*WSD, "steps=100")), (70, 100, (*WSD, "steps=200")), (80, 100, (*WSD, "steps=300")),
    (100, 100, ("optimizer.schedule=constant", "steps=200")), (5, 200, ("optimizer.lr=1e-3", "steps=205"))])
def test_a_rate_that_goes_on_smoothly_is_no_news(told, at, before, overrides):
    assert told([10, at], at, before, *overrides) is None


def test_a_rate_that_falls_at_once_is_news_too(told):
    """Fewer steps put a run into the middle of its decay."""
    assert "will have 0.0005" in told([50, 90], 90, 200, *WSD, "steps=101")


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_rates_are_those_of_the_updates(schedule):
    config = load(PretrainConfig, target=DEBUG, overrides=[f"optimizer.schedule={schedule}"]).optimizer
    rates = rates_at(config, step=9, before=10, steps=40)
    old, new = make_schedule(config, steps=10), make_schedule(config, steps=40)
    # The step counts the updates already made: the ninth was made at 8.
    assert rates == (float(old(np.int32(8))), float(old(np.int32(9))), float(new(np.int32(9))))
