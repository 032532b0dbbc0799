"""A directory is there whole, or not at all; one process at a time makes it."""

import subprocess
import sys

import pytest

from ctllm_jax.dataset.staging import exclusive, staged


def test_a_directory_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with exclusive(target), staged(target) as temporary:
        (temporary / "a").write_text("x")
        assert not target.exists()
    assert (target / "a").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), exclusive(tmp_path / "out"), staged(tmp_path / "out") as temporary:
        (temporary / "a").write_text("x")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    program = f"""
import os, pathlib, signal
from ctllm_jax.dataset.staging import exclusive, staged
target = pathlib.Path({str(tmp_path / "out")!r})
with exclusive(target), staged(target) as temporary:
    (temporary / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == -9
    assert any(path.name.startswith("out.tmp-") for path in tmp_path.iterdir())
    with exclusive(tmp_path / "out"), staged(tmp_path / "out") as temporary:
        (temporary / "whole").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


def test_the_lock_is_held_by_one_at_a_time(tmp_path):
    program = f"""
import pathlib, sys, time
from ctllm_jax.dataset.staging import exclusive
log = pathlib.Path({str(tmp_path / "log")!r})
for _ in range(5):
    with exclusive(pathlib.Path({str(tmp_path / "out")!r})):
        with open(log, "a") as file:
            file.write("in\\n")
            file.flush()
            time.sleep(0.005)
            file.write("out\\n")
"""
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert (tmp_path / "log").read_text().split() == ["in", "out"] * 20


def test_another_hosts_work_is_not_touched(tmp_path):
    other = tmp_path / "out.tmp-otherhost-1"
    other.mkdir()
    with pytest.raises(OSError), exclusive(tmp_path / "out"), staged(tmp_path / "out") as temporary:
        (temporary / "mine").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "out.tmp-otherhost-1", "theirs"]
