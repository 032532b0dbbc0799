"""metrics.jsonl on disk, and sinks that must not stop a run."""

import json
import logging
import math
import os
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ctllm_jax.report.run import read_run
from ctllm_jax.training.metrics import MetricsWriter, scalars

ZH = {"zh": {"loss": 3.0, "bits_per_byte": 1.7, "tokens": 1000, "bytes": 3200}}


def lines_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_bytes().splitlines()]


def write(directory, **settings):
    return MetricsWriter(directory, process_index=0, **settings)


def test_each_record_is_a_line_at_once_and_only_added(tmp_path):
    with write(tmp_path, steps=20) as metrics:
        metrics.event("start", step=0)
        metrics.event("sample", step=0, prompt="今天", text="天气\n很好\u2028")
        assert [line["event"] for line in lines_of(tmp_path)] == ["start", "sample"]
        assert "今天" in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    with write(tmp_path) as metrics:
        metrics.event("start", step=0)
    assert [line["event"] for line in lines_of(tmp_path)] == ["start", "sample", "start"]
    assert all(line["time"] > 1e9 for line in lines_of(tmp_path))


@pytest.mark.parametrize("value, spelled", [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"),
                                            (np.float32("nan"), "nan"), (np.array(np.inf), "inf")])
def test_a_number_that_is_none_becomes_null_and_is_told(tmp_path, value, spelled):
    with write(tmp_path) as metrics:
        metrics.event("train", step=1, loss=value, lr=1e-3)
        metrics.event("evaluation", step=1, sources={"zh": {"loss": value}})
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text
    train, evaluation = lines_of(tmp_path)
    assert train["loss"] is None and train["nonfinite"] == {"loss": spelled} and train["lr"] == 1e-3
    assert evaluation["nonfinite"] == {"sources.zh.loss": spelled}


def test_numbers_of_arrays_and_paths_are_written_and_the_rest_is_refused(tmp_path):
    with write(tmp_path) as metrics:
        metrics.event("train", step=np.int64(3), loss=np.float32(0.5), flag=np.bool_(True), where=tmp_path,
                      pair=(1, 2.0))
        with pytest.raises(TypeError, match="extra: object does not go into metrics.jsonl"):
            metrics.event("train", step=4, extra=object())
    (line,) = lines_of(tmp_path)
    assert [line[key] for key in ("step", "loss", "flag", "where", "pair")] == [3, 0.5, True, str(tmp_path), [1, 2]]


def test_a_lone_surrogate_does_not_stop_a_run(tmp_path):
    with write(tmp_path) as metrics:
        metrics.event("sample", step=1, prompt="a", text="\ud800后")
    assert lines_of(tmp_path)[0]["text"].endswith("后")


def test_a_line_torn_by_a_crash_costs_only_itself(tmp_path):
    with write(tmp_path) as metrics:
        metrics.event("start", step=0)
        metrics.event("train", step=1, loss=2.0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    with write(tmp_path) as metrics:
        metrics.event("start", step=0)
        metrics.event("train", step=1, loss=1.5)
    run = read_run(tmp_path)
    assert [record["loss"] for record in run.train] == [1.5] and len(run.starts) == 2
    assert run.problems == ["metrics.jsonl, line 2: not JSON; left out"]


def test_other_processes_write_nothing(tmp_path):
    with MetricsWriter(tmp_path / "run", process_index=1, tensorboard=True, wandb_project="p") as metrics:
        metrics.event("start", step=0)
    assert not (tmp_path / "run").exists()


def test_the_status_tells_where_the_run_is(tmp_path):
    def status():
        return json.loads((tmp_path / "status.json").read_text(encoding="utf-8"))

    with write(tmp_path, steps=20) as metrics:
        metrics.event("start", step=10)
        assert (status()["step"], status()["steps"], status()["state"], status()["loss"]) == (10, 20, "running", None)
        metrics.event("train", step=11, loss=2.5)
        metrics.event("evaluation", step=11, sources=ZH)
        assert (status()["step"], status()["loss"]) == (11, 2.5)
        metrics.event("end", step=11, reason="interrupted")
    assert status()["state"] == "interrupted" and status()["updated"] == lines_of(tmp_path)[-1]["time"]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "status.json"]


def test_scalars_are_of_numbers_alone():
    assert scalars({"event": "train", "time": 1.0, "step": 3, "loss": 2.0, "lr": None, "note": "x"}) == {
        "train/loss": 2.0}
    assert scalars({"event": "evaluation", "time": 1.0, "step": 3, "sources": {"zh": {"loss": 2, "x": None}}}) == {
        "evaluation/zh/loss": 2.0}
    assert scalars({"event": "warning", "time": 1.0, "message": "x"}) == {}


@pytest.mark.parametrize("settings, module, extra", [({"tensorboard": True}, "tensorboardX", "tb"),
                                                     ({"wandb_project": "p"}, "wandb", "wandb")])
def test_a_sink_that_is_not_installed_is_dropped_with_a_hint(tmp_path, monkeypatch, caplog, settings, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with caplog.at_level(logging.WARNING), write(tmp_path, **settings) as metrics:
        metrics.event("start", step=0)
        metrics.event("train", step=1, loss=2.0)
    warning, *rest = lines_of(tmp_path)
    assert warning["event"] == "warning" and f"ctllm-jax[{extra}]" in warning["message"]
    assert [line["event"] for line in rest] == ["start", "train"]
    assert len(caplog.records) == 1


class FakeRun:
    """What wandb.init gives, as far as it is used."""

    def __init__(self, fails_at=None):
        self.fails_at, self.logged, self.metrics, self.finished = fails_at, [], [], False

    def define_metric(self, *names, **settings):
        self.metrics.append((names, settings))

    def log(self, values):
        if values["step"] == self.fails_at:
            raise ConnectionError("no network")
        self.logged.append(values)

    def finish(self):
        self.finished = True


def fake_wandb(monkeypatch, run):
    calls = []
    module = SimpleNamespace(init=lambda **settings: calls.append(settings) or run, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_a_sink_that_raises_is_dropped_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    run = FakeRun(fails_at=2)
    fake_wandb(monkeypatch, run)
    with caplog.at_level(logging.WARNING), write(tmp_path, wandb_project="p") as metrics:
        for step in (1, 2, 3):
            metrics.event("train", step=step, loss=2.0)
    assert [line["event"] for line in lines_of(tmp_path)] == ["train", "train", "warning", "train"]
    assert "wandb is dropped" in lines_of(tmp_path)[2]["message"] and "no network" in lines_of(tmp_path)[2]["message"]
    assert [values["step"] for values in run.logged] == [1] and not run.finished
    assert len(caplog.records) == 1


def test_weights_and_biases_goes_on_with_one_run_on_our_steps(tmp_path, monkeypatch):
    run = FakeRun()
    calls = fake_wandb(monkeypatch, run)
    for first in (1, 1):
        with write(tmp_path, wandb_project="p", config={"steps": 5}) as metrics:
            metrics.event("train", step=first, loss=2.0)
            metrics.event("evaluation", step=first, sources=ZH)
    assert calls[0]["project"] == "p" and calls[0]["config"] == {"steps": 5} and calls[0]["resume"] == "allow"
    assert calls[0]["id"] == calls[1]["id"] and calls[0]["name"] == tmp_path.name
    assert "mode" not in calls[0], "WANDB_MODE decides"
    assert (("*",), {"step_metric": "step"}) in run.metrics
    assert run.logged[:2] == [{"train/loss": 2.0, "step": 1},
                              {**{f"evaluation/zh/{key}": value for key, value in ZH["zh"].items()}, "step": 1}]
    assert run.finished


def tensorboard_events(run_dir):
    """All events, file by file in the order in which TensorBoard reads them, parsed by the protocol's own classes."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason="extra tb is not installed")
    for path in sorted((run_dir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            yield event_pb2.Event.FromString(data[12:12 + size])
            data = data[16 + size:]


def test_tensorboard_events_hold_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX", reason="extra tb is not installed")
    with write(tmp_path, tensorboard=True) as metrics:
        metrics.event("train", step=7, loss=2.5, lr=math.nan)
        metrics.event("evaluation", step=7, sources=ZH)
        metrics.event("sample", step=7, prompt="今天", text="天气")
    found = {value.tag: (event.step, value.simple_value) for event in tensorboard_events(tmp_path)
             for value in event.summary.value}
    assert found["train/loss"] == (7, 2.5) and "train/lr" not in found
    assert found["evaluation/zh/bits_per_byte"] == (7, pytest.approx(1.7))
    assert any(tag.startswith("sample/") for tag in found)


def test_tensorboard_shows_a_step_once_that_is_made_again(tmp_path):
    """A START of a session purges what was written of its step and later ones, as TensorBoard's reader does."""
    pytest.importorskip("tensorboardX", reason="extra tb is not installed")
    with write(tmp_path, tensorboard=True) as metrics:
        metrics.event("start", step=0)
        for step in range(1, 8):
            metrics.event("train", step=step, loss=1.0)
    with write(tmp_path, tensorboard=True) as metrics:
        metrics.event("start", step=4)
        for step in range(5, 10):
            metrics.event("train", step=step, loss=2.0)
        metrics.event("rollback", step=9, to=7, data_step=9, rollbacks=1)
        metrics.event("train", step=8, loss=3.0)
    shown = {}
    for event in tensorboard_events(tmp_path):
        if event.session_log.status == 1:
            shown = {step: loss for step, loss in shown.items() if step < event.step}
        for value in event.summary.value:
            assert event.step not in shown
            shown[event.step] = value.simple_value
    assert shown == {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 2, 8: 3}
