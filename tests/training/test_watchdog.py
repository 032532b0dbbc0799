"""A run that hangs ends by itself, says where it hung, and asks to be started again."""

import builtins
import io
import os
import signal
import socket
import time

import pytest

from ctllm_jax.config.reliability import WatchdogConfig
from ctllm_jax.config.statuses import REQUEUE
from ctllm_jax.report.run import read_run
from ctllm_jax.training.supervision import watchdog
from ctllm_jax.training.supervision.goodput import Ledger
from ctllm_jax.training.supervision.watchdog import Watchdog
from tests.runs import DEBUG, REPOSITORY, cached, launch, start
from tests.training.test_processes import free_port

SCRIPT = REPOSITORY / "tests/training/hanging.py"
HEARTBEAT = 10


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return cached(tmp_path_factory.mktemp("compiled"))


def test_data_that_stops_coming_and_the_run_that_goes_on(tmp_path, cache):
    words = (f"run.dir={tmp_path}", "checkpoint.every=2", "watchdog.seconds=3")
    done = start("5", *words, script=SCRIPT, **cache).wait_for_text()
    assert done.returncode == REQUEUE, done.stdout
    message = f"process 0 on {socket.gethostname()}: no step was finished for"
    stacks = (tmp_path / "stacks-0.txt").read_text()
    for text in (done.stdout, stacks):
        assert message in text and "in phase data_wait); the last was step 5" in text and "wait_for_a_disk" in text
    run = read_run(tmp_path)
    assert run.state == "hung" and run.end["step"] == 4 and message in run.end["message"] and not run.problems
    again = launch("pretrain", DEBUG, *words, **cache)
    assert again.returncode == 0 and "resuming at step 4" in again.stdout, again.stdout


@pytest.fixture
def two(tmp_path, cache):
    """A run of two processes in the middle of its steps; both are gone at the end."""
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    words = ("pretrain", DEBUG, f"run.dir={tmp_path}", "steps=1000000", "log.every=50", "checkpoint.every=1000000",
             "mesh.data=2", f"distributed.heartbeat_seconds={HEARTBEAT}")
    both = [start(*words, **shared, JAX_PROCESS_ID=str(index), **cache) for index in range(2)]
    until = time.monotonic() + 180
    while not (tmp_path / "metrics.jsonl").exists() or not read_run(tmp_path).train:
        assert time.monotonic() < until and all(process.poll() is None for process in both)
        time.sleep(0.2)
    yield both
    for process in both:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "victim"), [
    (signal.SIGSTOP, 1), (signal.SIGKILL, 1), pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.slow)])
def test_a_peer_that_is_gone_is_named(two, tmp_path, number, victim):
    """Stopped, it keeps its connections open, and nothing but its silence tells; killed, they break."""
    os.kill(two[victim].pid, number)
    done = two[1 - victim].wait_for_text(timeout=120)
    assert done.returncode == REQUEUE, done.stdout
    message = (f"process {victim} (of 2, on {socket.gethostname()}, pid {two[victim].pid}) has given no sign of life"
               " for")
    assert message in done.stdout and message in (tmp_path / f"stacks-{1 - victim}.txt").read_text()
    if victim == 1:
        assert read_run(tmp_path).state == "lost a process"


class Metric:
    """A number that is there when it is said to be."""

    ready = False

    def is_ready(self):
        return self.ready


def test_a_peer_of_an_earlier_attempt_is_not_missed_and_one_that_left_says_how(tmp_path):
    """A file from before this attempt is nobody's; what a peer ended with is what this process ends with."""
    found = Watchdog(WatchdogConfig(), heartbeat_seconds=10, directory=tmp_path, ledger=Ledger(), tell=None)
    found._count = 3
    mine = found._write_sign()
    now = mine.stat().st_mtime
    for index, sign in ((1, now - 100), (2, now)):
        (mine.parent / str(index)).write_text('{"host": "h", "pid": 7}')
        os.utime(mine.parent / str(index), (sign, sign))
    os.utime(mine, (now + 20, now + 20))
    message, = found._silent(mine.parent, mine, began=now)
    assert message.startswith("process 2 (of 3, on h, pid 7) has given no sign of life for 20 s")
    assert found._status == REQUEUE
    (mine.parent / "2").write_text('{"host": "h", "pid": 7, "ended": 2}')
    os.utime(mine.parent / "2", (now, now))
    assert found._silent(mine.parent, mine, began=now) and found._status == 2


@pytest.mark.parametrize("blocked", ["processes", "processes/lost"])
def test_first_files_that_cannot_be_written_are_tried_again(tmp_path, caplog, blocked):
    found = Watchdog(WatchdogConfig(), heartbeat_seconds=0.1, directory=tmp_path, ledger=Ledger(), tell=None)
    found._count = 2
    processes, lost = tmp_path / "processes", tmp_path / "processes/lost"
    if blocked == "processes":
        processes.write_text("")  # a file where a folder is needed
    else:
        lost.mkdir(parents=True)  # a folder where a file is needed
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if processes.is_file():
            processes.unlink()
        elif lost.is_dir():
            lost.rmdir()
        return len(waits) > 1

    found._done.wait = wait
    found._watch_peers()
    assert "no sign of life could be given" in caplog.text
    assert (processes / "0").is_file() and lost.read_text() == ""


def test_the_signs_of_a_thousand_processes_cost_each_as_much_as_those_of_two(tmp_path, monkeypatch):
    """The process before a silent one finds out and tells the others; until then each looks at one of them."""
    def make(index):
        found = Watchdog(WatchdogConfig(), heartbeat_seconds=10, directory=tmp_path, ledger=Ledger(), tell=None)
        found._index, found._count = index, 1024
        return found

    folder = tmp_path / "processes"
    mine = make(5)._write_sign()
    now = mine.stat().st_mtime
    (folder / "lost").write_text('{"lost": ["of an earlier attempt"], "status": 75}')
    os.utime(folder / "lost", (now - 50, now - 50))
    for index in range(1024):
        (folder / str(index)).write_text('{"host": "h", "pid": 7}')
        sign = now if index in (7, 8, 300) else now + 20
        os.utime(folder / str(index), (sign, sign))
    calls = []
    for module, name in ((os, "stat"), (os, "fstat"), (os, "utime"), (os, "scandir"), (os, "listdir"),
                         (builtins, "open"), (io, "open")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name,
                            lambda *given, real=real, **more: calls.append(real.__name__) or real(*given, **more))
    assert make(5)._lost(folder, mine, began=now) == []
    assert len(calls) <= 6, calls
    first = make(6)._lost(folder, folder / "6", began=now)
    assert [text.split()[1] for text in first] == ["7", "8", "300"]  # all that are silent, found once
    calls.clear()
    last = make(900)
    assert last._lost(folder, folder / "900", began=now) == first and last._status == REQUEUE
    assert len(calls) <= 3, calls


def test_how_long_is_too_long(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    ledger = Ledger()
    found = Watchdog(WatchdogConfig(), heartbeat_seconds=10, directory=tmp_path, ledger=ledger, tell=None)
    assert found.limit == 3600  # starting
    with ledger.phase("step"):
        metrics = [Metric() for _ in range(4)]
        for step, metric in enumerate(metrics, 1):
            found.dispatched(step, {"loss": metric})
        assert found.limit == 3600  # the first step: libraries are loaded, connections made
        metrics[0].ready = metrics[2].ready = True
        now += 5
        found._look_for_finished()
        assert found.limit == 300 and found.idle() == 0  # 3 is there, but not before 2
        metrics[1].ready = metrics[3].ready = True
        now += 180
        assert found.idle() == 180
        found._look_for_finished()
        assert found.limit == 600 and found.idle() == 0  # ten times 180 s / 3 steps
        now += 100
        with ledger.phase("checkpoint"):
            assert found.limit == 3600 and found.idle() == 0
            now += 8
        assert found.idle() == 0
        now += 7
        assert found.idle() == 7
    with ledger.phase("evaluation"):
        now += 50
        found.beat()
        now += 1
        assert found.idle() == 1
