"""A run that is told to end keeps the step it is at, says why it ended, and goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctllm_jax.report.run import read_run
from tests.runs import DEBUG, assert_same_bits, cached, environment, launch, read_arrays, start

STEPS = 120
# Few lines: nobody reads them before the end, and a pipe that is full stops a run.
SHARED = ("checkpoint.every=100000", "log.every=20")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return cached(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    """The run that nobody disturbs, on two devices of one process."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    done = launch("pretrain", DEBUG, f"run.dir={directory}", f"steps={STEPS}", *SHARED, devices=2, **cache)
    assert done.returncode == 0, done.stdout
    return directory


def wait_for_steps(directory, process):
    until = time.monotonic() + 180
    while not (directory / "metrics.jsonl").exists() or not read_run(directory).train:
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.05)


def end(process):
    """The finished process, which printed no traceback."""
    done = process.wait_for_text()
    assert "Traceback" not in done.stdout, done.stdout
    return done


def assert_kept(directory, reason):
    """The step that a run ended at, which is kept, and the only one that is."""
    run = read_run(directory)
    status = json.loads((directory / "status.json").read_text())
    assert run.state == status["state"] == reason and 20 <= run.end["step"] == status["step"] < STEPS
    assert [path.name for path in (directory / "checkpoints").iterdir()] == [str(run.end["step"])]
    return run.end["step"]


def assert_as_undisturbed(directory, uninterrupted):
    assert_same_bits(read_arrays(directory, STEPS), read_arrays(uninterrupted, STEPS))
    ours, other = read_run(directory), read_run(uninterrupted)
    assert [(record["step"], record["loss"]) for record in ours.train] == \
        [(record["step"], record["loss"]) for record in other.train]


def test_sigterm_keeps_the_step_and_the_same_command_goes_on(tmp_path, uninterrupted, cache):
    command = ("pretrain", DEBUG, f"run.dir={tmp_path}", f"steps={STEPS}", *SHARED)
    process = start(*command, devices=2, **cache)
    wait_for_steps(tmp_path, process)
    process.terminate()
    process.terminate()  # a scheduler tells a job and its steps: within two seconds this is one notice
    done = end(process)
    assert done.returncode == 75, done.stdout
    step = assert_kept(tmp_path, "preempted")
    assert f"stopped at step {step} of {STEPS}, which is kept: the same command goes on" in done.stdout
    again = launch(*command, devices=2, **cache)
    assert again.returncode == 0 and f"resuming at step {step}" in again.stdout, again.stdout
    assert_as_undisturbed(tmp_path, uninterrupted)


def test_one_of_two_processes_is_told_and_both_keep_the_same_step(tmp_path, uninterrupted, cache):
    command = ("pretrain", DEBUG, f"run.dir={tmp_path}", f"steps={STEPS}", *SHARED, "processes=2")
    process = start(*command, devices=2, **cache)
    wait_for_steps(tmp_path, process)
    _, second = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(second), signal.SIGUSR1)
    done = end(process)
    assert done.returncode == 75, done.stdout
    step = assert_kept(tmp_path, "preempted")
    assert f"preempted: stopping after step {step}, and saving it" in done.stdout
    again = launch(*command, devices=2, **cache)
    assert again.returncode == 0 and f"resuming at step {step}" in again.stdout, again.stdout
    assert_as_undisturbed(tmp_path, uninterrupted)


def test_files_in_the_run_directory(tmp_path, cache):
    process = start("pretrain", DEBUG, f"run.dir={tmp_path}", "steps=100000", *SHARED, **cache)
    wait_for_steps(tmp_path, process)
    (tmp_path / "SAVE").touch()
    (tmp_path / "PROFILE").touch()

    def asked():
        return {event["what"].partition(":")[0]: event["step"] for event in read_run(tmp_path).events
                if event["event"] == "request"}

    until = time.monotonic() + 120
    while not any(what.startswith("the trace is in") for what in asked()):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.1)
    saved = asked()["SAVE"]
    assert not (tmp_path / "SAVE").exists() and not (tmp_path / "PROFILE").exists()
    assert list((tmp_path / "profile").rglob("*.xplane.pb")) and list((tmp_path / "profile").rglob("*.trace.json.gz"))
    (tmp_path / "STOP").touch()
    done = end(process)
    assert done.returncode == 0, done.stdout
    run = read_run(tmp_path)
    assert run.state == "stopped" and not run.problems and not (tmp_path / "STOP").exists()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [saved, run.end["step"]]
    assert f"SAVE: keeping step {saved}" in done.stdout and "report:" not in done.stdout


WAITING = """
import ctypes, sys
from ctllm_jax.training.supervision.signals import Signals
with Signals() as signals:
    if sys.argv[1] == "begun":
        signals.begin(lambda text: print(text, flush=True))
    print("ready", flush=True)
    lock = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(lock)
    ctypes.CDLL(None).pthread_mutex_lock(lock)  # for ever, and no handler of Python runs
"""


@pytest.mark.parametrize(("number", "status", "when"), [
    (signal.SIGTERM, 75, "begun"), (signal.SIGINT, 130, "begun"), (signal.SIGTERM, 75, "before")])
def test_a_second_signal_ends_a_process_that_waits(number, status, when):
    process = subprocess.Popen([sys.executable, "-c", WAITING, when], stdout=subprocess.PIPE, text=True,
                               env=environment())
    with process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            if when == "begun":
                time.sleep(2.1)
                assert process.poll() is None
                process.send_signal(number)
            assert process.wait(10) == status
        finally:
            process.kill()
