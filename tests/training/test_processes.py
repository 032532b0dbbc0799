"""Several processes are one program: the same bits as one process with as many devices."""

import os
import socket

import pytest

from ctllm_jax.config.pretrain import RunConfig
from ctllm_jax.report.run import read_run
from ctllm_jax.training.supervision.lock import own
from tests.runs import DEBUG, assert_same_bits, cached, launch, read_arrays, start
from tests.small_text import VOCABULARY, make_corpus


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return cached(tmp_path_factory.mktemp("compiled"))


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch_processes(count, *words, status=0, **variables):
    """The command in so many processes of one device each, to the end of all; what each printed."""
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
    started = [start(*words, **shared, JAX_PROCESS_ID=str(index), **variables) for index in range(count)]
    done = [process.wait_for_text() for process in started]
    assert {process.returncode for process in done} == {status}, "\n".join(process.stdout for process in done)
    return [process.stdout for process in done]


def launch_two(*words, **variables):
    """The command in two processes of one device each, to the end of both; what each printed."""
    return launch_processes(2, *words, **variables)


def test_two_replicas_give_the_bits_of_two_devices(tmp_path, cache):
    alone, together = tmp_path / "alone", tmp_path / "together"
    overrides = ("mesh.data=2", "checkpoint.every=4", "checkpoint.milestones=[1.024e-6]")
    one = launch("pretrain", DEBUG, f"run.dir={alone}", *overrides, devices=2, **cache)
    assert one.returncode == 0, one.stdout
    texts = launch_two("pretrain", DEBUG, f"run.dir={together}", *overrides, **cache)
    for step in (8, 10):
        assert_same_bits(read_arrays(together, step), read_arrays(alone, step))
    assert_same_bits(read_arrays(together, 2, "milestones"), read_arrays(alone, 2, "milestones"))
    # The second process writes nothing: each line of the metrics is there once, and the banner too.
    run = read_run(together)
    assert [record["step"] for record in run.train] == list(range(1, 11)) and len(run.starts) == 1
    assert run.start["devices"] == "2 x cpu"
    assert [record["loss"] for record in run.train] == [record["loss"] for record in read_run(alone).train]
    assert sorted("from scratch" in text for text in texts) == [False, True]
    # The newest step is damaged: both go on from the one before, and come to the same end.
    for file in (together / "checkpoints/10/trainer").glob("ocdbt.process_1/d/*"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    texts = launch_two("pretrain", DEBUG, f"run.dir={together}", *overrides, **cache)
    assert sorted("continuing from step 8" in text for text in texts) == [False, True]
    assert_same_bits(read_arrays(together, 10), read_arrays(alone, 10))
    assert (together / "quarantine/10").is_dir() and not (together / "lock").exists()


def test_one_owner_for_all_of_them(tmp_path, cache):
    """Somebody has the directory: the first process finds out, and all of them end with status 2."""
    with own(RunConfig(dir=str(tmp_path)), what="a test"):
        texts = launch_processes(2, "pretrain", DEBUG, f"run.dir={tmp_path}", "mesh.data=2", status=2, **cache)
    assert sorted(f"is in use by process {os.getpid()}" in text for text in texts) == [False, True]
    assert sum("the first process says by whom" in text for text in texts) == 1
    assert os.listdir(tmp_path) == []


@pytest.fixture
def on_text(tmp_path):
    """Overrides of a run on text whose weights are split over two devices, with held-out loss and samples."""
    (tmp_path / "corpus").mkdir()
    corpus = make_corpus(tmp_path / "corpus")
    return ["mesh.data=1", "mesh.fsdp=2", f"model.vocab_size={VOCABULARY}", "data.kind=mixture",
            *(f"data.sources.{name}={corpus.folder / name}" for name in ("zh", "en")), "evaluation.every=2",
            "evaluation.rows_per_device=3", "sample.every=2", "sample.max_tokens=6", "checkpoint.every=2",
            "optimizer.schedule=constant"]


def assert_same_words(ours, other, steps):
    """The same held-out losses and samples at these steps, digit for digit."""
    ours, other = read_run(ours), read_run(other)
    assert [record["step"] for record in ours.evaluation] == steps
    for mine, theirs in zip(ours.evaluation + ours.sample, other.evaluation + other.sample, strict=True):
        assert {**mine, "time": 0} == {**theirs, "time": 0}


def test_two_halves_of_a_model_on_text(tmp_path, on_text, cache):
    """Each process reads its own rows of the mixture; held-out loss and samples come from weights split over both."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    one = launch("pretrain", DEBUG, f"run.dir={alone}", *on_text, "steps=3", devices=2, **cache)
    assert one.returncode == 0, one.stdout
    launch_two("pretrain", DEBUG, f"run.dir={together}", *on_text, "steps=3", **cache)
    assert_same_bits(read_arrays(together, 3), read_arrays(alone, 3))
    assert_same_words(together, alone, [2, 3])


@pytest.mark.slow
def test_restarts_with_another_number_of_processes(tmp_path, on_text, cache):
    """What two wrote, one goes on from; what one wrote, two go on from."""
    first_one, first_two = tmp_path / "first one", tmp_path / "first two"
    for steps in (3, 5):
        one, two = (first_one, first_two) if steps == 3 else (first_two, first_one)
        done = launch("pretrain", DEBUG, f"run.dir={one}", *on_text, f"steps={steps}", devices=2, **cache)
        assert done.returncode == 0 and ("resuming at step 3" in done.stdout) == (steps == 5), done.stdout
        launch_two("pretrain", DEBUG, f"run.dir={two}", *on_text, f"steps={steps}", **cache)
        assert_same_bits(read_arrays(one, steps), read_arrays(two, steps))
    assert_same_words(first_one, first_two, [2, 3, 4, 5])


@pytest.mark.slow
def test_another_number_of_processes_twice(tmp_path, on_text, cache):
    """2 -> 1 -> 4: the same batches and losses as one process that went through; sums are in another order."""
    on_text = [word for word in on_text if not word.startswith(("evaluation", "sample"))]
    on_text += ["evaluation.every=0", "sample.every=0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = launch("pretrain", DEBUG, f"run.dir={whole}", *on_text, "steps=7", devices=2, **cache)
    assert done.returncode == 0, done.stdout
    launch_two("pretrain", DEBUG, f"run.dir={parts}", *on_text, "steps=3", **cache)
    done = launch("pretrain", DEBUG, f"run.dir={parts}", *on_text, "mesh.fsdp=1", "steps=5", **cache)
    assert done.returncode == 0 and "resuming at step 3" in done.stdout, done.stdout
    texts = launch_processes(4, "pretrain", DEBUG, f"run.dir={parts}", *on_text, "mesh.data=2", "steps=7", **cache)
    assert sum("resuming at step 5" in text for text in texts) == 1
    ours, other = read_run(parts), read_run(whole)
    assert [record["step"] for record in ours.train] == list(range(1, 8))
    for mine, theirs in zip(ours.train, other.train, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5) and mine["tokens"] == theirs["tokens"]
