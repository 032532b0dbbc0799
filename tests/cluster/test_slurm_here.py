"""A real SLURM, on this machine: the generated script on two nodes, told to make way, requeued, cancelled."""

import json
import shlex
import sys

import pytest

from ctllm_jax.report.run import read_run
from tests.cli.conftest import call
from tests.cluster.slurm_here import Slurm, missing
from tests.runs import DEBUG, REPOSITORY, assert_same_bits, cached, environment, launch, read_arrays

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(missing()), reason=missing() or "it is here")]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with Slurm(tmp_path_factory.mktemp("slurm")) as daemons:
        daemons.environment |= environment(PATH=daemons.environment["PATH"],
                                           SLURM_CONF=daemons.environment["SLURM_CONF"],
                                           http_proxy="http://proxy.invalid:3128",
                                           **cached(tmp_path_factory.mktemp("compiled")))
        yield daemons


def submit(slurm, folder, *overrides):
    """A job of two nodes in `folder`: its number, where its run is, and its log."""
    script, run, log = folder / "job.sbatch", folder / "run", folder / "job.log"
    written = call("job", "slurm", DEBUG, f"run.dir={run}", "checkpoint.every=100000", *overrides, "job.nodes=2",
                   "job.gpus_per_node=0", f"job.log={log}", f"job.directory={REPOSITORY}",
                   f"job.launcher={shlex.quote(sys.executable)} launch.py", f"job.output={script}")
    assert written.status == 0 and f"sbatch {script}" in written.out, written.err
    return slurm.call("sbatch", "--parsable", script), run, log


def steps_of(run):
    return len(read_run(run).train) if (run / "metrics.jsonl").exists() else 0


def test_a_job_is_told_keeps_a_step_comes_back_and_ends_with_the_same_bits(slurm, tmp_path):
    job, run, log = submit(slurm, tmp_path, "steps=600", "log.every=20")
    slurm.wait_for(lambda: steps_of(run), f"steps\n{log.read_text() if log.exists() else ''}", seconds=120)
    # What --signal=B:USR1@… does at the end of the time: a signal to the shell of the job.
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_for(lambda: slurm.state(job)[2] == 1, "the requeue", seconds=120)
    kept = json.loads((run / "status.json").read_text())
    assert kept["state"] == "preempted" and 20 <= kept["step"] < 600
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(kept["step"])]
    slurm.wait_for(lambda: slurm.state(job)[0] not in ("PENDING", "RUNNING", "COMPLETING"), "the end", seconds=240)
    text = log.read_text()
    assert slurm.state(job) == ("COMPLETED", 0, 1), text
    assert f"0: stopped at step {kept['step']} of 600" in text and f"resuming at step {kept['step']}" in text
    assert "ended with status 75" in text and "back into the queue" in text and "start 2, on n[1-2]" in text
    assert "slurm: process 0 of 2, coordinator n1:" in text
    whole = launch("pretrain", DEBUG, f"run.dir={tmp_path / 'whole'}", "checkpoint.every=100000", "steps=600",
                   "log.every=20", devices=2, **cached(tmp_path))
    assert whole.returncode == 0, whole.stdout
    assert_same_bits(read_arrays(run, 600), read_arrays(tmp_path / "whole", 600))
    assert [(record["step"], record["loss"]) for record in read_run(run).train] == \
        [(record["step"], record["loss"]) for record in read_run(tmp_path / "whole").train]


def test_a_wrong_config_fails_for_good(slurm, tmp_path):
    job, run, log = submit(slurm, tmp_path, "data=nowhere")
    slurm.wait_for(lambda: slurm.state(job)[0] not in ("PENDING", "RUNNING", "COMPLETING"), "the end", seconds=120)
    assert slurm.state(job) == ("FAILED", 2, 0), log.read_text()
    assert "data.sources.data.path=nowhere does not exist" in log.read_text()


def test_a_cancelled_job_keeps_a_step_and_does_not_come_back(slurm, tmp_path):
    job, run, log = submit(slurm, tmp_path, "steps=100000", "log.every=20")
    slurm.wait_for(lambda: steps_of(run), "steps", seconds=120)
    slurm.call("scancel", job)
    slurm.wait_for(lambda: slurm.state(job)[0] == "CANCELLED", "the end", seconds=120)
    assert slurm.state(job)[2] == 0 and "ended with status 75" in log.read_text(), log.read_text()
    assert "cancelled: it does not come back" in log.read_text() and "start 2" not in log.read_text()
    assert json.loads((run / "status.json").read_text())["state"] == "preempted", log.read_text()
