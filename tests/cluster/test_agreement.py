"""Processes that are about to do different things are stopped before they do it, and each difference is named."""

import itertools
import threading
from types import SimpleNamespace

import jax
import pytest

from ctllm_jax.cluster import agreement
from ctllm_jax.cluster.agreement import check_same, describe_differences, open_same
from ctllm_jax.config.data import DataConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.load import load, shared_values
from ctllm_jax.config.pretrain import PretrainConfig
from tests.runs import DEBUG, start
from tests.training.test_processes import free_port


class Store:
    """What stands in for JAX's key-value store, with the calls of each process counted."""

    def __init__(self):
        self.kept, self.calls, self.lock = {}, [], threading.Lock()

    def key_value_set(self, key, value):
        with self.lock:
            self.kept[key] = value
            self.calls.append("set")

    def key_value_dir_get(self, key):
        with self.lock:
            return [(name, value) for name, value in self.kept.items() if name.startswith(key + "/")]

    def blocking_key_value_get(self, key, milliseconds):
        with self.lock:
            self.calls.append("get")
            return self.kept[key]


@pytest.fixture
def processes(monkeypatch):
    """`(what each does) -> what each returned or raised`, each process a thread."""
    here = threading.local()
    store = Store()
    monkeypatch.setattr(jax, "process_index", lambda: here.index)
    monkeypatch.setattr(agreement, "_POLL", 0.001)

    def run(*works):
        monkeypatch.setattr(jax, "process_count", lambda: len(works))
        monkeypatch.setattr(jax._src.distributed, "global_state", SimpleNamespace(client=store))
        monkeypatch.setattr(agreement, "_numbers", itertools.repeat(len(store.calls)))
        results = [None] * len(works)

        def take_part(index, work):
            here.index = index
            try:
                results[index] = work()
            except (UserError, OSError) as error:
                results[index] = error

        threads = [threading.Thread(target=take_part, args=each) for each in enumerate(works)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        return results

    run.store = store
    return run


def test_the_same_on_all_processes(processes):
    assert processes(*[lambda: check_same({"a": {"b": 1}}, what="config")] * 5) == [None] * 5
    # Each process writes its hash and its text, process 0 the verdict; texts are read only where hashes differ.
    assert processes.store.calls == ["set"] * 11


def test_each_difference_is_named_with_its_processes(processes):
    values = [{"optimizer": {"lr": 0.01}, "steps": 5}] * 6
    values[4] = {"optimizer": {"lr": 0.05}, "steps": 5}
    values[2] = {"optimizer": {"lr": 0.05}, "steps": 6, "seed": 1}
    errors = processes(*(lambda own=own: check_same(own, what="config") for own in values))
    assert len({str(error) for error in errors}) == 1
    assert ("do not have the same config:\n  optimizer.lr: 0.01 in processes 0-1, 3, 5, 0.05 in processes 2, 4\n"
            "  seed: absent in processes 0-1, 3-5, 1 in process 2\n"
            "  steps: 5 in processes 0-1, 3-5, 6 in process 2\n") in str(errors[3])


@pytest.mark.parametrize("kind", [UserError, OSError])
def test_what_one_process_cannot_open_is_told_to_all(processes, kind):
    def fail():
        raise kind("no such folder /data on this host")

    opened = [lambda: "data", fail, lambda: "data"]
    errors = processes(*(lambda each=each: open_same(each, lambda data: {"data": data}, what="data")
                         for each in opened))
    assert str(errors[1]) == "no such folder /data on this host"
    assert all("process 1: no such folder /data on this host" in str(errors[index]) for index in (0, 2))
    assert processes(*[lambda: open_same(lambda: "data", lambda data: {"data": data}, what="data")] * 2) == ["data"] * 2


def test_long_values_are_cut_and_still_told_apart():
    lines = describe_differences([([0], {"a": "x" * 300 + "y"}), ([1], {"a": "x" * 300 + "z"})])
    assert len(lines) < 300 and lines.count("… (") == 2 and "in process 0, " in lines


def test_keys_of_one_machine_may_differ():
    """Where a machine keeps its files and how it loads them is its own; what it trains is not."""
    words = ["data.kind=mixture", "data.sources.zh.path=/a/zh", "data.cache_dir=/a/cache", "data.workers=2"]
    others = ["data.kind=mixture", "data.sources.zh.path=/b/zh", "data.cache_dir=/b/cache", "data.workers=0"]
    ours, other = (shared_values(load(PretrainConfig, target=DEBUG, overrides=each)) for each in (words, others))
    assert ours == other and ours["data"]["sources"] == {"zh": {"weight": 1.0, "text_field": "text", "split": "train"}}
    heavier = load(PretrainConfig, target=DEBUG, overrides=[*words, "data.sources.zh.weight=2"])
    assert shared_values(heavier) != ours
    assert shared_values(DataConfig(kind="synthetic"))["isolate_documents"] is True


def test_two_processes_with_different_learning_rates_train_nothing(tmp_path):
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    started = [start("pretrain", DEBUG, f"run.dir={tmp_path / 'run'}", "mesh.data=2", f"optimizer.lr={lr}", **shared,
                     JAX_PROCESS_ID=str(index)) for index, lr in enumerate(("1e-2", "5e-2"))]
    done = [process.wait_for_text() for process in started]
    assert [process.returncode for process in done] == [2, 2], [process.stdout for process in done]
    for process in done:
        assert "optimizer.lr: 0.01 in process 0, 0.05 in process 1" in process.stdout
        assert "Traceback" not in process.stdout
    assert not (tmp_path / "run").exists()
