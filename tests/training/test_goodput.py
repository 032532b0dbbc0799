"""Where the time went: nothing is counted twice, and nothing is left out."""

import time

import pytest

from ctllm_jax.cli import process_began
from ctllm_jax.report.goodput import add_up, goodput_line
from ctllm_jax.report.page import render
from ctllm_jax.report.run import Run, read_run
from ctllm_jax.training.supervision import goodput
from ctllm_jax.training.supervision.goodput import Ledger
from tests.runs import DEBUG, REPOSITORY, cached, launch, start


def test_a_phase_inside_of_another_is_taken_out_of_it(monkeypatch):
    now = 0.0
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now)
    ledger = Ledger(began=-5.0)
    now = 1.0
    with ledger.phase("step"):
        now = 3.0
        with ledger.phase("data_wait"):
            now = 3.5
        with pytest.raises(ValueError), ledger.phase("checkpoint"):
            now = 7.5
            raise ValueError
        now = 8.0
        assert ledger.read() == {"init": 6.0, "step": 2.5, "data_wait": 0.5, "checkpoint": 4.0}
    now = 10.0
    assert ledger.read()["init"] == 8.0 and sum(ledger.read().values()) == 15.0


def test_when_this_process_began():
    # Pytest and its imports took some of it; nobody tests for a day.
    began = process_began()
    assert process_began() == pytest.approx(began, abs=5) and 0.2 < time.perf_counter() - began < 86_400


def told(moment, at, skipped=0, **seconds):
    return {"event": "goodput", "time": moment, "step": at, "skipped": skipped, "seconds": seconds}


def begun(moment, step):
    return {"event": "start", "time": moment, "step": step}


def closed(moment, step):
    return {"event": "close", "time": moment, "step": step}


def parts(*records):
    """What is not 0, and the sum of all."""
    found = add_up(Run(None, ledger=list(records)))
    return {name: round(seconds, 6) for name, seconds in found.parts.items() if seconds}, found


def test_steps_made_again_after_a_restart():
    """Killed at step 16, 4 s after its last word at step 14, and gone on from 10 after a minute's pause."""
    found, whole = parts(
        begun(110, 0), told(110, 0, init=7.0, compile=3.0), told(121, 10, init=7.0, compile=3.0, step=10.0,
                                                                 checkpoint=1.0),
        told(125, 14, init=7.0, compile=3.0, step=14.0, checkpoint=1.0), closed(129, 16),
        begun(194, 10), told(194, 10, init=5.0), told(204, 20, init=5.0, step=10.0), closed(204, 20))
    assert found == {"training": 20.0, "restarts": 8.0, "init": 12.0, "compile": 3.0, "checkpoint": 1.0}
    assert (whole.total, whole.between, whole.attempts) == (44.0, 60.0, 2)


def test_steps_given_up_and_steps_skipped():
    """Step 2 is skipped; 7 and 8 are, and with them go 5 and 6."""
    found, whole = parts(
        begun(1, 0), told(1, 0, init=1.0), told(5, 4, 1, init=1.0, step=4.0), told(9, 8, 3, init=1.0, step=8.0),
        {"event": "rollback", "time": 9, "step": 8, "to": 4},
        told(17, 10, 3, init=1.0, step=14.0, rollback=2.0), closed(17, 10))
    assert found == {"training": 9.0, "skipped": 1.0, "rolled_back": 4.0, "rollback": 2.0, "init": 1.0}
    assert whole.total == 17.0


def test_a_restart_from_within_an_earlier_attempt():
    """The second attempt got no further than its first checkpoint would have been."""
    found, whole = parts(
        begun(0, 0), told(0, 0), told(10, 10, step=10.0), closed(10, 10),
        begun(20, 10), told(20, 10, init=2.0), told(25, 15, init=2.0, step=5.0), closed(25, 15),
        begun(40, 5), told(40, 5, init=2.0), told(50, 15, init=2.0, step=10.0), closed(50, 15))
    assert found == {"training": 15.0, "restarts": 10.0, "init": 4.0} and whole.total == 29.0


def test_two_attempts_add_up_to_the_time_on_the_wall(tmp_path):
    """The first is killed when it is about to save step 6; the second goes on from an earlier one."""
    cache, run_dir = cached(tmp_path / "compiled"), tmp_path / "run"
    words = (f"run.dir={run_dir}", "checkpoint.every=2")
    began = time.time()
    killed = start("6", "before", *words, script=REPOSITORY / "tests/training/killed_run.py", **cache).wait_for_text()
    assert killed.returncode == -9, killed.stdout
    first = read_run(run_dir).last_time - began
    began = time.time()
    done = launch("pretrain", DEBUG, *words, **cache)
    assert done.returncode == 0 and "resuming at step" in done.stdout, done.stdout
    run = read_run(run_dir)
    found = add_up(run)
    assert found.total == pytest.approx(first + run.end["time"] - began, rel=0.05)
    assert found.parts["restarts"] > 0 and found.parts["compile"] > 0 and found.parts["skipped"] == 0
    assert found.attempts == 2 and sum(found.parts.values()) == pytest.approx(found.total)
    line = goodput_line(run)
    assert line.startswith("goodput ") and line in done.stdout
    page = render([run])
    assert "Where the time went" in page and "steps made again after a restart" in page
