"""What stops the pipeline from outside (a full disk, a worker that dies, Ray that is not there) is said in words."""

import errno
import os
import socket
import subprocess
import sys
import time
import types

import pytest

from ctllm_jax.config.errors import UserError
from data_prep import engine
from data_prep.engine import Engine
from data_prep.pipeline import prepare
from tests.data_prep.corpus import clean_texts, config, write_corpus


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x.parquet")


def die(unit, options):
    os._exit(9)


@pytest.fixture
def small(tmp_path):
    write_corpus(tmp_path / "raw", documents=8, files=2)
    return config(tmp_path, rules="none", minhash={"enabled": False})


@pytest.mark.parametrize("place", ["data_prep.stages.read.write_part", "data_prep.stages.filter.write_part",
                                   "data_prep.duplicates.exact", "data_prep.commits.flush"])
def test_a_full_disk_is_named_and_costs_nothing_that_is_done(tmp_path, small, monkeypatch, place):
    with monkeypatch.context() as broken:
        broken.setattr(place, full)
        with pytest.raises(UserError, match="the disk is full .*/data/x.parquet.*same command continues") as failure:
            prepare(small)
    assert "Traceback" not in str(failure.value)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith(".tmp")]
    prepare(small)
    assert len(clean_texts(tmp_path / "out")) == 9  # One of the two copies differs a little.


def test_an_unexpected_failure_leaves_its_traceback_in_a_file(tmp_path, small, monkeypatch):
    monkeypatch.setattr("data_prep.stages.read.write_part", lambda *_: 1 // 0)
    expected = "2 of 2 units of the stage read failed.*ZeroDivisionError: .*failed.txt"
    with pytest.raises(UserError, match=expected) as failure:
        prepare(small)
    assert "Traceback" not in str(failure.value)
    assert "Traceback" in (tmp_path / "out/stages/read/failed.txt").read_text()


@pytest.mark.slow
def test_a_worker_that_dies_is_named():
    with pytest.raises(UserError, match="a worker process has ended .*workers=1.*the same command continues"):
        list(Engine(workers=2).run(die, [{"id": "a"}, {"id": "b"}], {}))


def test_workers_find_the_package_wherever_the_command_was_started(tmp_path, monkeypatch):
    command = [sys.executable, "-S", "-c", "import data_prep"]  # -S: without what an environment has installed
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 1
    engine._let_workers_import_us()
    engine._let_workers_import_us()
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    assert os.environ["PYTHONPATH"].split(os.pathsep)[1:] == ["/somewhere"]


@pytest.fixture
def ray(monkeypatch):
    """A stand-in for Ray, which is not installed everywhere: `init` is what each test makes of it."""
    module = types.ModuleType("ray")
    module.is_initialized = lambda: False
    monkeypatch.setitem(sys.modules, "ray", module)
    return module


@pytest.mark.parametrize(("address", "message"), [
    ("head", "it is HOST:PORT, ray://HOST:PORT or auto"), ("ray://head:x", "it is HOST:PORT"),
    ("127.0.0.1:{}", "nothing answers there .*without ray.address"), ("ray://127.0.0.1:{}", "nothing answers there"),
    ("127.0.0.1:99999", "nothing answers there")])
def test_a_wrong_address_of_ray_is_refused_at_once(ray, address, message):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # Bound and not listening: nobody else has this port, and nothing answers.
        with pytest.raises(UserError, match=message):
            Engine(kind="ray", address=address.format(unused.getsockname()[1]))


def test_ray_that_does_not_start_is_said_while_waiting_and_at_the_end(ray, monkeypatch, caplog):
    def init(**_):
        while "waiting for Ray on this machine to start" not in caplog.text:
            time.sleep(0.01)
        raise RuntimeError("no GCS")

    ray.init = init
    monkeypatch.setattr(engine, "_RAY_SECONDS", 0.01)
    with pytest.raises(UserError, match="Ray on this machine does not start: no GCS. engine=native needs no Ray"):
        Engine(kind="ray")
