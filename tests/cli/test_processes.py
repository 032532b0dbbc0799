"""`processes=N`: what each process is given, and what becomes of all when one ends."""

import os
import signal
import time
from pathlib import Path

import pytest

from ctllm_jax.cli.processes import share_devices
from ctllm_jax.cluster import distributed
from ctllm_jax.config.errors import UserError
from ctllm_jax.report.run import read_run
from tests.cli.conftest import call
from tests.runs import DEBUG, launch, start

FLAG = "--xla_force_host_platform_device_count"


def test_processes_share_the_devices_of_the_cpu():
    first, second = share_devices({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_a=b {FLAG}=8"}, 2)
    assert first["XLA_FLAGS"] == second["XLA_FLAGS"] == f"--xla_a=b {FLAG}=4"
    assert first["JAX_COORDINATOR_ADDRESS"] == second["JAX_COORDINATOR_ADDRESS"]
    assert (first["JAX_PROCESS_ID"], second["JAX_PROCESS_ID"]) == ("0", "1")
    with pytest.raises(UserError, match="processes=3 does not divide the 8 CPU devices"):
        share_devices({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{FLAG}=8"}, 3)


def test_each_process_has_a_gpu(monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name == "jax_cuda13_plugin")
    given = {"CUDA_VISIBLE_DEVICES": "4,5"}
    assert [each["JAX_LOCAL_DEVICE_IDS"] for each in share_devices(given, 2)] == ["0", "1"]
    with pytest.raises(UserError, match="processes=3: each has a GPU, and there are 2 here"):
        share_devices(given, 3)
    assert "JAX_LOCAL_DEVICE_IDS" not in share_devices(given | {"JAX_PLATFORMS": "cpu"}, 3)[0]


def test_processes_inside_of_several_are_refused(monkeypatch):
    given = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    printed = call("pretrain", DEBUG, "processes=3")
    assert printed.status == 2 and "processes=3 starts processes on this machine, and this is one of" in printed.err


def test_what_is_wrong_is_said_once(tmp_path):
    done = launch("pretrain", DEBUG, f"run.dir={tmp_path / 'run'}", "processes=2", "data=nowhere", devices=2)
    assert done.returncode == 2 and done.stdout.count("error: ") == 1 and "Traceback" not in done.stdout, done.stdout


def test_when_one_dies_the_others_end(tmp_path):
    process = start("pretrain", DEBUG, f"run.dir={tmp_path}", "steps=100000", "log.every=20", "processes=2",
                    devices=2)
    until = time.monotonic() + 180
    while not (tmp_path / "metrics.jsonl").exists() or not read_run(tmp_path).train:
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.1)
    children = [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(children[1], signal.SIGKILL)
    done = process.wait_for_text(timeout=60)
    assert done.returncode == 137 and "process 1 ended with status 137" in done.stdout, done.stdout
    assert not any(Path(f"/proc/{child}").exists() for child in children)
