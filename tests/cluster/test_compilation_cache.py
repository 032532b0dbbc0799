"""Where compiled programs are kept: on where it is safe, off where it is not, and a second start compiles nothing."""

import json

import pytest

from ctllm_jax.cluster import compilation_cache
from ctllm_jax.cluster.hardware import Accelerators
from tests.runs import launch


@pytest.fixture
def on(monkeypatch):
    """A machine with these accelerators."""
    def be(accelerators):
        monkeypatch.setattr(compilation_cache, "find_accelerators", lambda environment: accelerators)

    return be


TPUS, GPUS = Accelerators("tpu", "v5p", 4), Accelerators("gpu", "h100", 8)


@pytest.mark.parametrize(("machine", "setting", "environment", "directory"), [
    (TPUS, "auto", {}, "/shared/runs/.compilation_cache"), (GPUS, "auto", {}, "/shared/runs/.compilation_cache"),
    (None, "auto", {}, None), (None, "off", {}, None), (TPUS, "off", {}, None),
    (None, "/mine", {}, "/mine"), (TPUS, "gs://bucket/cache", {}, "gs://bucket/cache"),
    (TPUS, "auto", {"JAX_COMPILATION_CACHE_DIR": "/own"}, "/own"),
    (None, "off", {"JAX_COMPILATION_CACHE_DIR": "/own"}, "/own"),
    (TPUS, "/mine", {"JAX_ENABLE_COMPILATION_CACHE": "false"}, None)])
def test_the_directory(machine, setting, environment, directory, on):
    on(machine)
    before = dict(environment)
    assert compilation_cache.set_directory(environment, setting, run_dir="/shared/runs/one") == directory
    if directory is None:
        assert environment == before
    else:
        assert environment["JAX_COMPILATION_CACHE_DIR"] == directory
        assert directory in compilation_cache.describe_directory(environment)


@pytest.mark.parametrize(("run_dir", "directory"), [
    ("runs/one", "runs/.compilation_cache"), ("one", ".compilation_cache"), ("/one/", "/.compilation_cache"),
    ("gs://bucket/runs/one", "gs://bucket/runs/.compilation_cache")])
def test_it_lies_beside_the_run(run_dir, directory, on):
    on(TPUS)
    assert compilation_cache.choose_directory("auto", run_dir=run_dir, environment={}) == directory


def compile_seconds(run_dir):
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return next(event["compile_seconds"] for event in events if event["event"] == "start")


def test_a_second_start_takes_what_the_first_compiled(tmp_path):
    """The command itself, twice, in a directory that was asked for; a third without one leaves none."""
    cache = tmp_path / "cache"
    for name in ("first", "second"):
        done = launch("pretrain", "debug/pretrain", "steps=2", "optimizer.warmup_steps=1", f"run.dir={tmp_path / name}",
                      f"compute.compilation_cache={cache}", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
        assert done.returncode == 0, done.stdout
        assert f"programs kept in {cache}" in done.stdout.replace("\n", " ")
        entries = {path.name for path in cache.glob("*-cache")}
        if name == "first":
            there = entries
            assert any("train_step" in entry for entry in entries)
    assert entries == there, "the second start compiled something"
    assert compile_seconds(tmp_path / "second") < 0.7 * compile_seconds(tmp_path / "first")
    environment = json.loads((tmp_path / "second" / "environment.json").read_text())
    assert environment["programs"] == f"kept in {cache}"


def test_it_is_off_on_a_cpu(tmp_path):
    done = launch("pretrain", "debug/pretrain", "steps=2", "optimizer.warmup_steps=1", f"run.dir={tmp_path / 'run'}",
                  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert done.returncode == 0, done.stdout
    assert "programs not kept (CPU)" in done.stdout and not list(tmp_path.rglob("*-cache"))
