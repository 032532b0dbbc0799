"""Updates that must not be made are not, on every process, and what follows is what would have followed anyway."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctllm_jax import cli
from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.config.reliability import SpikesConfig
from ctllm_jax.config.statuses import DIVERGED
from ctllm_jax.data import pretrain as training_data
from ctllm_jax.preflight.hlo import Program
from ctllm_jax.report.run import read_run
from ctllm_jax.training import step as step_module
from ctllm_jax.training.loop import Hook
from ctllm_jax.training.objective import Opened, next_tokens
from ctllm_jax.training.run import prepare_run
from ctllm_jax.training.state import Spikes, init_state
from ctllm_jax.training.step import make_train_step
from ctllm_jax.training.supervision.recovery import Diverged
from tests.runs import DEBUG, REPOSITORY, assert_same_bits, cached, read_arrays, start
from tests.training.planted import Planted
from tests.training.test_processes import free_port

pytestmark = pytest.mark.usefixtures("planned_once")
SCRIPT = REPOSITORY / "tests/training/planted.py"


def toy(spikes=None, *, branches=True):
    """A step of two weights, whose batch is its loss's slope; its first state."""
    def loss_fn(params, frozen, batch):
        return jnp.sum(params["w"] * batch), jnp.float32(1), {}

    optimizer = optax.scale_by_adam()
    step = make_train_step(loss_fn, optimizer, lambda step: jnp.float32(0.01), spikes=spikes, branches=branches)
    state = init_state({"w": jnp.ones(2)}, optimizer, spikes=spikes is not None)
    return jax.jit(step, donate_argnums=0), state


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("branches", [True, False])
@pytest.mark.parametrize("spikes", [None, SpikesConfig(deviations=6.0)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_an_update_that_is_not_finite_changes_nothing_but_the_counters(branches, spikes, bad):
    """3e38: the loss is finite, its gradient's norm is not."""
    step, state = toy(spikes, branches=branches)
    state, metrics = step(state, jnp.array([1.0, 2.0]), None)
    before = bits((state.params, state.opt_state))
    state, metrics = step(state, jnp.array([0.1, bad]), None)
    assert bits((state.params, state.opt_state)) == before
    count = state.bad_steps.bad_steps if spikes else state.bad_steps
    assert (int(state.step), int(state.data_step), int(count), int(metrics["skipped"])) == (2, 2, 1, 1)
    if spikes:
        assert int(state.bad_steps.seen) == 1 and np.isfinite(np.asarray(state.bad_steps.norm_mean))
    state, metrics = step(state, jnp.array([1.0, 2.0]), None)
    assert bits((state.params, state.opt_state)) != before and int(metrics["bad_steps"]) == 1
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state))


def test_spikes_are_what_a_sum_by_hand_says():
    """Norms drawn at random, some of them far off: mean and deviation in float64, by the definition."""
    config = SpikesConfig(deviations=4.0, window=20, warmup=10)
    step, state = toy(config)
    draw = np.random.default_rng(0)
    slopes = 1 + 0.1 * draw.standard_normal(120)
    slopes[5] *= 3  # within warm-up: learned from
    slopes[[40, 41, 77]] *= 30
    slopes[90:] *= 3  # a level that stays
    mean = variance = 0.0
    skipped = []
    for index, slope in enumerate(slopes):
        norm = slope * np.sqrt(2)
        bound = mean + 4 * max(np.sqrt(variance), 1e-3 * abs(mean))
        expected = index >= 10 and norm > bound
        taken = min(norm, bound) if index >= 10 else norm
        share = max(1 / (index + 1), 1 / 20)
        mean, variance = mean + share * (taken - mean), (1 - share) * (variance + share * (taken - mean) ** 2)
        # The loss, the weights' sum times the slope, falls below zero with them, and is no spike of its own.
        state, metrics = step(state, jnp.full(2, slope, jnp.float32), None)
        assert bool(metrics["skipped"]) == expected, index
        skipped += [index] if expected else []
    assert {40, 41, 77, 90} <= set(skipped) and 5 not in skipped
    # What has risen for good is taken for what it is after some steps.
    assert max(skipped) < 100 and int(state.bad_steps.spikes) == len(skipped) and int(state.bad_steps.bad_steps) == 0
    np.testing.assert_allclose(float(state.bad_steps.norm_mean), mean, rtol=1e-4)


def make_run(directory, planted, *overrides, skip=lambda step: step):
    """The debug run over planted batches, and a function that trains it (`stop_at`: until behind that step)."""
    config = load(PretrainConfig, target=DEBUG, overrides=["checkpoint.every=2", "checkpoint.keep_last=3",
                                                           *overrides])
    data = Planted(sequence_length=config.batch.sequence_length, rows=config.batch.rows, seed=config.seed,
                   vocab_size=config.model.vocab_size)
    data.planted, data.skip = planted, skip
    run = prepare_run(Opened(config, data, next_tokens(data.token_bytes), {}), directory=directory)
    seen, rollbacks = [], []

    def save(step, state):
        run.checkpointer.save(state, step=step)

    def train(stop_at=None):
        due = Hook(save, lambda step: step % 2 == 0 and not run.recovery.in_a_row)
        run.train(record=lambda step, metrics, timing: seen.append((step, metrics)), hooks=[due],
                  stop_due=lambda step: step == stop_at, rolled_back=rollbacks.append)
        return seen, rollbacks

    return run, train


def test_a_skipped_step_and_a_resume_over_it(tmp_path):
    """The run behind a skipped step is that of a run that never had its batch, but for the schedule."""
    run, train = make_run(tmp_path / "whole", {4: 2}, "optimizer.schedule=constant", "optimizer.warmup_steps=0")
    seen, _ = train()
    assert [int(metrics["skipped"]) for _, metrics in seen] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert not np.isfinite(seen[4][1]["loss"]) and int(run.state.bad_steps) == 1
    other, train_other = make_run(tmp_path / "other", {}, "optimizer.schedule=constant", "optimizer.warmup_steps=0",
                                  skip=lambda step: step + (step >= 4))
    train_other(9)
    assert bits(run.state.params) == bits(other.state.params)
    for stop in (4, 5):
        _, train_part = make_run(tmp_path / str(stop), {4: 2}, "optimizer.schedule=constant",
                                 "optimizer.warmup_steps=0")
        train_part(stop)
        _, train_rest = make_run(tmp_path / str(stop), {4: 2}, "optimizer.schedule=constant",
                                 "optimizer.warmup_steps=0")
        train_rest()
        assert_same_bits(read_arrays(tmp_path / str(stop), 10), read_arrays(tmp_path / "whole", 10))


BACK = ("bad_steps.rollback_after=3",)


def test_back_to_the_checkpoint_before_and_on_behind_the_data(tmp_path):
    """Data steps 5, 6 and 7 hurt: from step 8 back to 4, and on with data step 8, as if 4 to 7 had not been there."""
    planted = {5: 0, 6: 7, 7: 3}
    run, train = make_run(tmp_path / "whole", planted, *BACK)
    seen, rollbacks = train()
    assert [tuple(rollback) for rollback in rollbacks] == [(8, 4, 8, 1)]
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8, 9, 10]
    assert (int(run.state.step), int(run.state.data_step), int(run.state.bad_steps)) == (10, 14, 3)
    other, train_other = make_run(tmp_path / "other", {}, skip=lambda step: step + 4 * (step >= 4))
    train_other()
    assert bits((run.state.params, run.state.opt_state)) == bits((other.state.params, other.state.opt_state))
    # Stopped in the middle of the bad steps, and behind the rollback: the same bits, and the same decision.
    whole = read_arrays(tmp_path / "whole", 10)
    for stops in ((7,), (6, 5)):
        directory = tmp_path / "-".join(map(str, stops))
        found = []
        for stop in (*stops, None):
            _, train_on = make_run(directory, planted, *BACK)
            found += train_on(stop)[1]
        # What was decided once and not yet kept is decided again.
        assert {tuple(rollback) for rollback in found} == {(8, 4, 8, 1)}
        assert_same_bits(read_arrays(directory, 10), whole)


def test_no_more_rollbacks_than_allowed_and_none_without_a_checkpoint(tmp_path):
    always = {step: 1 for step in range(5, 50)}
    _, train = make_run(tmp_path / "always", always, *BACK, "bad_steps.max_rollbacks=2")
    with pytest.raises(Diverged, match=r"3 steps in a row were skipped, up to step 7, after 2 rollbacks") as caught:
        train()
    assert caught.value.code == DIVERGED
    _, train = make_run(tmp_path / "early", {0: 0, 1: 0, 2: 0}, *BACK)
    with pytest.raises(Diverged, match="there is no checkpoint from before them"):
        train()


def test_the_guard_is_turned_on_and_off_again_in_a_run_that_goes_on(tmp_path):
    def go_on(*overrides, stop_at):
        run, train = make_run(tmp_path, {1: 0}, *overrides)
        assert run.how == ("scratch" if stop_at == 2 else "resume")
        train(stop_at)
        return run.state.bad_steps

    assert int(go_on(stop_at=2)) == 1
    guard = go_on("bad_steps.spikes=6", stop_at=4)
    assert isinstance(guard, Spikes) and (int(guard.bad_steps), int(guard.seen)) == (1, 2)
    assert int(go_on("bad_steps.spikes=6", stop_at=6).seen) == 4
    assert int(go_on(stop_at=8)) == 1


def test_what_a_person_and_a_machine_see(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_data, "SyntheticData", Planted)
    monkeypatch.setattr(Planted, "planted", {1: 0, **{step: 0 for step in range(5, 20)}})
    words = ["pretrain", DEBUG, f"run.dir={tmp_path}", "checkpoint.every=2", "bad_steps.rollback_after=2",
             "bad_steps.max_rollbacks=1", "mesh.data=8"]
    assert cli.main(words) == DIVERGED
    shown = capsys.readouterr().out
    for text in ("step 2: an update was skipped, not finite (1 in all)", "| bad 2 |",
                 "step 7: updates stay bad; back to the checkpoint of step 4, and on at data step 7 (rollback 1)",
                 "diverged: 2 steps in a row were skipped, up to step 6, after 1 rollbacks (bad_steps.max_rollbacks)"):
        assert text in shown, shown
    run = read_run(tmp_path)
    assert run.state == "diverged" and not run.problems
    assert [(it["step"], it["to"], it["data_step"]) for it in run.events if it["event"] == "rollback"] == [(7, 4, 7)]
    assert [record["step"] for record in run.train] == [1, 2, 3, 4, 5, 6] and run.train[-1]["bad_steps"] == 5


def test_a_row_of_one_of_two_processes_is_skipped_by_both(tmp_path):
    """One bad step, and two that lead back, in rows that only the second process reads: the bits of one process."""
    cache = cached(tmp_path / "compiled")
    words = (json.dumps({"1": 7, "5": 6, "6": 5}), "mesh.data=2", "checkpoint.every=2", "bad_steps.rollback_after=2")
    alone, together = tmp_path / "alone", tmp_path / "together"
    one = start(*words, f"run.dir={alone}", script=SCRIPT, devices=2, **cache).wait_for_text()
    assert one.returncode == 0, one.stdout
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    both = [start(*words, f"run.dir={together}", script=SCRIPT, **shared, JAX_PROCESS_ID=str(index), **cache)
            for index in range(2)]
    done = [process.wait_for_text() for process in both]
    assert [process.returncode for process in done] == [0, 0], "\n".join(process.stdout for process in done)
    assert (together / "weights-0").read_text() == (together / "weights-1").read_text()
    ours, other = read_arrays(together, 10), read_arrays(alone, 10)
    assert_same_bits(ours, other)
    assert ours["trainer['bad_steps']"] == 3 and ours["trainer['data_step']"] == 13
    for directory in (alone, together):
        run = read_run(directory)
        assert [it["to"] for it in run.events if it["event"] == "rollback"] == [4] and not run.problems


@pytest.mark.aot
@pytest.mark.slow
def test_the_guard_costs_no_memory_and_no_collective(monkeypatch):
    """Beside the same step without a choice, compiled for four TPU chips: temporaries, donation, what is sent."""
    from tests.training.test_aot import XLA, plan
    from tests.training.test_aot import devices as open_slice

    slice_of_four = open_slice.__wrapped__()

    def compile_step():
        step = plan(slice_of_four, "block", XLA, "mesh.fsdp=4", "mesh.tensor=1", "model.num_layers=2")
        lowered = step.jitted.lower(step.abstract_state, step.abstract_batch, None)
        return lowered.compile()

    def sent(step):
        return sorted((each.kind, each.payload, each.times) for each in Program(step.as_text()).collectives())

    guarded = compile_step()
    monkeypatch.setattr(step_module.jax.lax, "cond", lambda good, update, keep: update())
    free = compile_step()
    ours, other = guarded.memory_analysis(), free.memory_analysis()
    assert ours.alias_size_in_bytes == other.alias_size_in_bytes > 0.99 * ours.output_size_in_bytes
    assert ours.temp_size_in_bytes < 1.02 * other.temp_size_in_bytes
    assert sent(guarded) == sent(free)
