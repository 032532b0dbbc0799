"""A run that is killed at any moment goes on as if nothing had happened: bit for bit."""

import json
import shutil
import signal

import jax
import pytest

from ctllm_jax import sharding
from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.report.run import read_run
from ctllm_jax.training.loop import Hook
from ctllm_jax.training.pretrain import open_stage
from ctllm_jax.training.run import prepare_run
from tests.runs import DEBUG, REPOSITORY, assert_same_bits, cached, launch, read_arrays, start
from tests.training.killed_run import MOMENTS

STEPS = 10
OVERRIDES = ("checkpoint.every=1", "checkpoint.keep_last=2", "mesh.fsdp=2", "mesh.data=1")
SCRIPT = REPOSITORY / "tests/training/killed_run.py"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the processes share what they compile; the uninterrupted run compiles for itself."""
    return cached(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    directory = tmp_path_factory.mktemp("uninterrupted")
    done = launch("pretrain", DEBUG, f"run.dir={directory}", *OVERRIDES, devices=2, **cache)
    assert done.returncode == 0, done.stdout
    return directory


def kill(directory, step, moment, cache):
    """The debug run up to a moment of the checkpoint of a step."""
    killed = start(step, moment, f"run.dir={directory}", *OVERRIDES, script=SCRIPT, devices=2, **cache).wait_for_text()
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    return {int(path.name) for path in (directory / "checkpoints").glob("*") if path.name.isdigit()}


def resume(directory, cache):
    """The same command to its end."""
    done = launch("pretrain", DEBUG, f"run.dir={directory}", *OVERRIDES, devices=2, **cache)
    assert done.returncode == 0, done.stdout
    return done.stdout


def check(directory, uninterrupted):
    """The last checkpoint, the metrics and the disk are those of a run that nobody killed."""
    assert_same_bits(read_arrays(directory, STEPS), read_arrays(uninterrupted, STEPS))
    ours, other = read_run(directory), read_run(uninterrupted)
    assert ours.state == "done" and not ours.problems
    assert [record["step"] for record in ours.train] == list(range(1, STEPS + 1))
    for mine, theirs in zip(ours.train, other.train, strict=True):
        assert all(mine[name] == theirs[name] for name in ("loss", "grad_norm", "lr", "tokens"))
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {"9", "10"}
    return ours


def test_killed_at_every_step(tmp_path, uninterrupted, cache):
    """One run, killed nine times: at each step, at each moment in turn."""
    done = start("each", tmp_path, *OVERRIDES, script=SCRIPT, devices=2, **cache).wait_for_text()
    assert done.returncode == 0 and "resuming" in done.stdout, done.stdout
    left = json.loads(done.stdout.splitlines()[-1])
    assert [each["step"] for each in left] == list(range(1, STEPS)) and {each["moment"] for each in left} == {*MOMENTS}
    for each in left:
        if each["moment"] != "during":
            assert (each["step"] in each["whole"]) == (each["moment"] not in ("before", "manifest", "written"))
        if each["moment"] == "displacing":
            assert len(each["whole"]) == 3
        if each["moment"] == "deleting":
            # Two: the run before was killed when it was about to displace one.
            assert len(each["trash"]) == 2
            assert all("trainer" in half_deleted and "params" not in half_deleted for half_deleted in each["trash"])
    run = check(tmp_path, uninterrupted)
    assert [start["how"] for start in run.starts][0] == "scratch" and len(run.starts) == STEPS
    assert {start["how"] for start in run.starts[2:]} == {"resume"}


@pytest.mark.parametrize("rounds", [5, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_at_any_moment(tmp_path, uninterrupted, cache, rounds):
    """Whenever it is killed while it steps, saves and deletes: every run ends as the one that was left alone."""
    done = start("rounds", rounds, rounds, tmp_path, *OVERRIDES, script=SCRIPT, devices=2, **cache).wait_for_text(1500)
    assert done.returncode == 0, done.stdout
    killed, runs = map(int, done.stdout.splitlines()[-1].split())
    assert killed >= rounds / 3
    for number in range(runs):
        check(tmp_path / str(number), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("step", range(1, STEPS))
def test_killed_once(tmp_path, uninterrupted, cache, step, moment):
    kill(tmp_path, step, moment, cache)
    resume(tmp_path, cache)
    check(tmp_path, uninterrupted)


def train_to_the_end(directory, *overrides, devices, monkeypatch):
    """How the run began, and the loss of each step."""
    make_mesh = sharding.make_mesh
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:devices]))
        opened = open_stage(load(PretrainConfig, target=DEBUG, overrides=["steps=6", *overrides]))
        run = prepare_run(opened, directory=directory)
    losses = {}
    save = Hook(lambda step, state: run.checkpointer.save(state, step=step), run.checkpointer.is_due)
    run.train(record=lambda step, metrics, timing: losses.update({step: metrics["loss"]}), hooks=[save])
    return run.start, losses


def test_another_mesh_goes_on_with_the_same_losses(tmp_path, monkeypatch):
    first = tmp_path / "first"
    start, expected = train_to_the_end(first, "checkpoint.every=3", "mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2",
                                       devices=8, monkeypatch=monkeypatch)
    assert start == 0 and sorted(expected) == [1, 2, 3, 4, 5, 6] and expected[6] < expected[3] < expected[1]
    shutil.rmtree(first / "checkpoints/6")
    for devices, mesh in ((8, ("mesh.data=4", "mesh.fsdp=2")), (2, ("mesh.fsdp=2", "mesh.data=1")), (1, ())):
        directory = tmp_path / str(mesh)
        shutil.copytree(first, directory)
        start, losses = train_to_the_end(directory, *mesh, devices=devices, monkeypatch=monkeypatch)
        assert start == 3 and losses == pytest.approx({step: expected[step] for step in (4, 5, 6)}, rel=1e-5)
