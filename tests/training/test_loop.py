"""The loop, told by the order of its calls: devices never wait for the host to read, print or save."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.training import loop
from ctllm_jax.training.loop import Clock, Hook, every, run_loop
from ctllm_jax.training.objective import next_tokens
from ctllm_jax.training.run import Run
from ctllm_jax.training.state import State


class Metric:
    """A number that is still on the device: says when it is waited for, and when it is read."""

    def __init__(self, log, step):
        self.log, self.step = log, step

    def block_until_ready(self):
        self.log.append(f"wait {self.step}")
        return self

    def __array__(self, dtype=None, copy=None):
        self.log.append(f"read {self.step}")
        return np.float32(self.step)


class Loop:
    """Runs the loop with everything faked, and keeps the order of the calls."""

    def __init__(self, *, start=0, stop, log_every=1, hooks=(), stop_due=lambda step: False):
        self.log, self.records = [], []
        self.state = run_loop(start, self.train_step, self.batches(start), start=start, stop=stop, log_every=log_every,
                              record=self.record, stop_due=stop_due,
                              hooks=[Hook(partial(self.hook, name), due) for name, due in hooks])

    def batches(self, start):
        step = start
        while True:
            step += 1
            self.log.append(f"batch {step}")
            yield step

    def train_step(self, state, batch, frozen):
        assert batch == state + 1 and frozen is None
        self.log.append(f"step {batch}")
        return batch, {"loss": Metric(self.log, batch)}

    def record(self, step, metrics, timing):
        assert metrics == {"loss": step} and timing.keys() == {"step_seconds", "data_wait"}
        self.log.append(f"record {step}")
        self.records.append(step)

    def hook(self, name, step, state):
        assert state == step
        self.log.append(f"{name} {step}")


def test_metrics_are_read_when_the_next_step_is_on_its_way():
    made = Loop(stop=3)
    assert made.log == ["batch 1", "step 1", "batch 2", "step 2", "read 1", "record 1", "batch 3", "step 3", "read 2",
                        "record 2", "read 3", "record 3"]
    assert made.state == 3


def test_only_what_is_recorded_is_read():
    made = Loop(stop=7, log_every=3)
    assert made.records == [3, 6, 7]
    assert [call for call in made.log if call.startswith("read")] == ["read 3", "read 6", "read 7"]
    assert made.log.index("read 3") == made.log.index("step 4") + 1


def test_a_hook_sees_its_own_step_recorded_and_no_later_one_begun():
    made = Loop(stop=4, hooks=[("save", lambda step: step == 2), ("evaluate", lambda step: step in (2, 4))])
    at = made.log.index("save 2")
    assert made.log[at - 4:at + 3] == ["record 1", "wait 2", "read 2", "record 2", "save 2", "evaluate 2", "batch 3"]
    assert "save 4" not in made.log and made.log[-1] == "evaluate 4"
    assert made.records == [1, 2, 3, 4]


def test_hooks_are_due_at_multiples_and_at_the_end():
    made = Loop(stop=10, log_every=100, hooks=[("save", every(4, last=10)), ("evaluate", every(5, last=10))])
    assert [call for call in made.log if call.startswith(("save", "evaluate"))] == [
        "save 4", "evaluate 5", "save 8", "save 10", "evaluate 10"]


def test_a_resumed_run_begins_at_the_next_step():
    made = Loop(start=5, stop=7)
    assert made.log[:2] == ["batch 6", "step 6"] and made.records == [6, 7]


def test_a_run_that_is_over_draws_no_batch():
    made = Loop(start=5, stop=5)
    assert made.log == [] and made.state == 5


def test_an_interrupted_loop_ends_behind_its_step_with_its_hooks():
    calls = iter([False, True])
    made = Loop(stop=9, hooks=[("save", lambda step: True)], stop_due=lambda step: next(calls))
    assert made.state == 2 and made.log[-1] == "save 2" and made.records == [1, 2]


def test_nothing_moves_between_host_and_devices_inside_a_step():
    """An array that was left on the host would cost a copy in every step: it raises. Outside the step it may move."""
    double = jax.jit(lambda x, y: (x + y, {"loss": x}))
    hook = Hook(lambda step, state: jnp.zeros(3) + 1, lambda step: True)

    def run(other):
        return run_loop(jax.device_put(np.float32(1)), lambda state, batch, frozen: double(state, other), iter([0, 0]),
                        start=0, stop=2, log_every=1, record=lambda *record: None, hooks=[hook])

    assert run(jax.device_put(np.float32(1))) == 3
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(np.float32(1))


class Device:
    """A device that works through a queue, `seconds` a step, and a clock on the wall that only it and we move."""

    def __init__(self, monkeypatch, *, seconds):
        self.now, self.free_at, self.seconds = 0.0, 0.0, seconds
        monkeypatch.setattr(loop.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(loop, "Clock", partial(Clock, started=0.0))

    def train_step(self, state, batch, frozen):
        self.free_at = max(self.free_at, self.now) + self.seconds
        return state, {"loss": Promise(self, self.free_at)}

    def batches(self, *, seconds):
        while True:
            self.now += seconds
            yield None

    def readings(self, *, stop, log_every, data=0.0, hooks=()):
        """{step: timing} of a loop."""
        found = {}
        run_loop(None, self.train_step, self.batches(seconds=data), start=0, stop=stop, log_every=log_every,
                 record=lambda step, metrics, timing: found.update({step: timing}), hooks=hooks)
        return found


class Promise:
    """A number that is there from a certain time on; who wants it before waits."""

    def __init__(self, device, ready_at):
        self.device, self.ready_at = device, ready_at

    def block_until_ready(self):
        self.device.now = max(self.device.now, self.ready_at)
        return self

    def __array__(self, dtype=None, copy=None):
        self.block_until_ready()
        return np.float32(1)


def test_time_of_hooks_counts_for_no_step(monkeypatch):
    """Steps of 2 s on the device, hooks of 100 s on the host."""
    device = Device(monkeypatch, seconds=2)

    def hook(step, state):
        device.now += 100

    found = device.readings(stop=12, log_every=3, hooks=[Hook(hook, lambda step: step in (2, 3, 7, 11))])
    assert found == {step: {"step_seconds": pytest.approx(2), "data_wait": 0} for step in (3, 6, 9, 12)}


def test_waiting_for_data_is_told_as_a_share(monkeypatch):
    """Batches that take 3 s, for a device that takes 1: of each step's 3 s all but the first's are spent waiting."""
    found = Device(monkeypatch, seconds=1).readings(stop=20, log_every=5, data=3)
    for step in (10, 15, 20):
        assert found[step] == {"step_seconds": pytest.approx(3, rel=0.25), "data_wait": pytest.approx(1, abs=0.1)}


class Data:
    """A source that knows whether its threads were stopped."""

    closed = False
    started_at = None

    def iterate(self, start_step, *, local_rows):
        self.started_at = start_step
        try:
            while True:
                yield {"rows": np.asarray(local_rows, np.float32)}
        finally:
            self.closed = True


@pytest.fixture
def make_run(monkeypatch):
    """(train_step) -> a run of the debug config over `Data`, at step 3, and what became of its checkpointer."""
    monkeypatch.setattr("ctllm_jax.training.run.place_batch", lambda batch, **options: batch)

    def make(train_step):
        from ctllm_jax.sharding import make_mesh

        saved = []
        checkpointer = SimpleNamespace(save=lambda state, *, step, last: saved.append((step, last)),
                                       close=lambda: saved.append("closed"))
        state = State({}, {}, jnp.int32(3), jnp.int32(4), jnp.int32(0))
        config = load(PretrainConfig, target="debug/pretrain", overrides=["steps=6"])
        return Run(config, None, make_mesh({"data": 8, "fsdp": 1, "tensor": 1}), None, Data(), state, "resume",
                   train_step, checkpointer, 1, 1, 0.0, 3, next_tokens()), saved

    return make


def advance(state, batch, frozen):
    return state.replace(step=jax.device_put(np.int32(int(state.step) + 1))), {"loss": np.float32(1)}


def test_a_run_ends_kept_and_closed(make_run):
    run, saved = make_run(advance)
    assert run.train(record=lambda *record: None, hooks=[]) == 6
    assert saved == [(6, True), "closed"] and run.data.closed and run.data.started_at == 4


def test_an_interrupted_run_keeps_the_step_it_reached(make_run):
    run, saved = make_run(advance)
    assert run.train(record=lambda *record: None, hooks=[], stop_due=lambda step: True) == 4
    assert saved == [(4, True), "closed"] and run.data.closed


@pytest.mark.parametrize("where", ["step", "hook", "record", "data"])
def test_whatever_is_raised_the_source_and_the_checkpointer_are_closed(make_run, where):
    def fail(*arguments):
        raise RuntimeError("broken")

    run, saved = make_run(fail if where == "step" else advance)
    if where == "data":
        run.data.iterate = lambda start_step, *, local_rows: (fail() for _ in [0])
        run.data.closed = True
    # `caught` keeps the frames alive, and with them what is not closed on purpose.
    with pytest.raises(RuntimeError, match="broken") as caught:
        run.train(record=fail if where == "record" else lambda *record: None,
                  hooks=[Hook(fail, lambda step: True)] if where == "hook" else [])
    assert saved == ["closed"] and run.data.closed and caught.tb is not None
