"""One owner for a run directory, however many want to be, and whatever became of the one before."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pretrain import RunConfig
from ctllm_jax.training.supervision.lock import LOCK, Lock, own, read_owner
from tests.runs import DEBUG, REPOSITORY, cached, environment, launch, start

PROCESS = """
import errno, os, sys, time
from pathlib import Path
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pretrain import RunConfig
from ctllm_jax.training.supervision.lock import Lock

def no_links(source, target):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))

run_dir, how, at = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
if "unlinked" in how:
    os.link = no_links
lock = Lock(run_dir, stale_after=0.6, what="a test")
while time.time() < at:
    pass
try:
    while lock.attempt() is not None:
        time.sleep(0.01)
except UserError as error:
    sys.exit(str(error))
print("owner", flush=True)
if "die" in how:
    os._exit(9)
sys.stdin.read()
lock.release()
"""


def process(run_dir, how="", at=0.0):
    return subprocess.Popen([sys.executable, "-c", PROCESS, str(run_dir), how, str(at)], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
                            env=environment())


def another_machine(run_dir, **differing):
    """The lock as a process elsewhere left it."""
    owner = json.loads((run_dir / LOCK).read_text())
    (run_dir / LOCK).write_text(json.dumps({**owner, "place": "elsewhere", "host": "n7", **differing}))


@pytest.fixture
def left(tmp_path):
    """A run directory whose owner was killed."""
    with process(tmp_path, "die") as dead:
        dead.wait()
    assert (tmp_path / LOCK).exists()
    return tmp_path


@pytest.mark.parametrize("how", ["free", "left", "free, unlinked", "left, unlinked"])
def test_of_eight_at_once_one_wins(tmp_path, how):
    if "left" in how:
        with process(tmp_path, "die") as dead:
            dead.wait()
    at = time.time() + 1.5
    racing = [process(tmp_path, how, at) for _ in range(8)]
    try:
        losers = [one for one in racing if one.stdout.readline() == ""]
        winners = [one for one in racing if one not in losers]
        assert len(winners) == 1
        for one in losers:
            assert f"is in use by process {winners[0].pid} on " in one.communicate()[1] and one.returncode == 1
        assert read_owner(tmp_path)["pid"] == winners[0].pid
    finally:
        for one in racing:
            one.communicate()
    assert os.listdir(tmp_path) == []


def test_who_it_is_and_what_to_do(tmp_path):
    with process(tmp_path) as owner:
        assert owner.stdout.readline() == "owner\n"
        with pytest.raises(UserError) as caught, own(RunConfig(dir=str(tmp_path)), what="a test"):
            raise AssertionError
        head, *advice = str(caught.value).splitlines()
        since = datetime.fromtimestamp(read_owner(tmp_path)["since"]).astimezone().isoformat(" ", "seconds")
        assert head == (f"{tmp_path} is in use by process {owner.pid} on {os.uname().nodename}, since {since} (a test)")
        assert f"touch {tmp_path}/STOP  (or kill {owner.pid})" in advice[0] and "another run.dir" in advice[2]
    with own(RunConfig(dir=str(tmp_path)), what="a test"):
        assert read_owner(tmp_path)["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_given_back_when_the_run_ends_by_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), own(RunConfig(dir=str(tmp_path)), what="a test"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_one_on_this_machine_that_is_gone_is_replaced_at_once(left, caplog):
    before = read_owner(left)
    with own(RunConfig(dir=str(left), stale_after=1e6), what="a test"):
        assert read_owner(left)["id"] != before["id"]
    assert f"was held by process {before['pid']}" in caplog.text


def test_the_same_number_of_another_process(left):
    """Process ids are used again: this one is alive, and is not the owner."""
    another_machine(left, place=json.loads((left / LOCK).read_text())["place"], pid=os.getpid())
    with own(RunConfig(dir=str(left), stale_after=1e6), what="a test"):
        pass


def test_one_elsewhere_is_replaced_when_its_heart_stands_still(left, caplog):
    another_machine(left, stale_after=1.0)
    began = time.monotonic()
    with own(RunConfig(dir=str(left), stale_after=1e6), what="a test"):
        assert 0.5 < time.monotonic() - began
    assert "on n7" in caplog.text and caplog.text.count("watching for at most 1 s whether") == 1
    # One that stood still long ago is not watched any more.
    with process(left, "die") as dead:
        dead.wait()
    another_machine(left, stale_after=30.0)
    os.utime(left / LOCK, (time.time() - 40,) * 2)
    with own(RunConfig(dir=str(left), stale_after=1e6), what="a test"):
        assert caplog.text.count("watching") == 1


def test_one_elsewhere_whose_heart_beats_stays(tmp_path):
    with process(tmp_path) as owner:
        assert owner.stdout.readline() == "owner\n"
        lock = Lock(tmp_path, stale_after=1e6)
        lock._mine["place"] = "elsewhere"
        # For this process the other one is on another machine.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ctllm_jax.training.supervision.owner._place", lambda: "elsewhere")
            with pytest.raises(UserError, match=f"is in use by process {owner.pid}"):
                while lock.attempt() is not None:
                    time.sleep(0.02)


def test_an_owner_that_slept_too_long_ends_when_it_wakes(tmp_path):
    """Suspended, replaced, and awake again: it must not write there any more."""
    with process(tmp_path) as owner:
        assert owner.stdout.readline() == "owner\n"
        owner.send_signal(signal.SIGSTOP)
        another_machine(tmp_path)
        with own(RunConfig(dir=str(tmp_path), stale_after=1e6), what="a test"):
            owner.send_signal(signal.SIGCONT)
            assert owner.wait(timeout=30) == 1
            assert "has another owner now" in owner.stderr.read()
            assert read_owner(tmp_path)["pid"] == os.getpid()


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written: Read-only file system"):
        with own(RunConfig(dir=str(tmp_path)), what="a test"):
            raise AssertionError


def test_two_trainers_of_one_run(tmp_path, tmp_path_factory):
    """The second is refused with status 2; the first, told to make way, gives the directory back."""
    shared = cached(tmp_path_factory.mktemp("compiled"))
    words = ("pretrain", DEBUG, f"run.dir={tmp_path}/run", "steps=1000000", "optimizer.schedule=constant",
             "log.every=1000")
    first = start(*words, **shared)
    try:
        while not (tmp_path / "run/checkpoints/5").exists():
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.1)
        second = launch(*words, **shared)
        assert second.returncode == 2 and f"in use by process {first.pid} on " in second.stdout, second.stdout
        assert "(pretrain)" in second.stdout and "Traceback" not in second.stdout
        first.send_signal(signal.SIGTERM)
        assert first.wait_for_text().returncode == 75
    finally:
        first.kill()
        first.wait()
    assert not (tmp_path / "run" / LOCK).exists() and (tmp_path / "run/status.json").exists()
