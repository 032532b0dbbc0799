"""Several processes are one program: the same bits as one process with as many devices."""

import socket

import pytest

from ctllm_jax.report.run import read_run
from tests.runs import DEBUG, assert_same_bits, cached, launch, read_arrays, start

OVERRIDES = ("checkpoint.every=4", "checkpoint.milestones=[1.024e-6]", "optimizer.schedule=constant")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return cached(tmp_path_factory.mktemp("compiled"))


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch_two(*words, **variables):
    """The command in two processes of one device each, to the end of both; what each printed."""
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    both = [start(*words, **shared, JAX_PROCESS_ID=str(index), **variables) for index in range(2)]
    done = [process.wait_for_text() for process in both]
    assert [process.returncode for process in done] == [0, 0], "\n".join(process.stdout for process in done)
    return [process.stdout for process in done]


@pytest.mark.parametrize("mesh", [("mesh.data=2",), ("mesh.data=1", "mesh.fsdp=2")], ids=["data", "fsdp"])
def test_two_processes_give_the_bits_of_two_devices(tmp_path, cache, mesh):
    alone, together = tmp_path / "alone", tmp_path / "together"
    one = launch("pretrain", DEBUG, f"run.dir={alone}", *OVERRIDES, *mesh, devices=2, **cache)
    assert one.returncode == 0, one.stdout
    texts = launch_two("pretrain", DEBUG, f"run.dir={together}", *OVERRIDES, *mesh, **cache)

    for step in (8, 10):
        assert_same_bits(read_arrays(together, step), read_arrays(alone, step))
    assert_same_bits(read_arrays(together, 2, "milestones"), read_arrays(alone, 2, "milestones"))
    # The second process writes nothing: each line of the metrics is there once, and the banner too.
    run = read_run(together)
    assert [record["step"] for record in run.train] == list(range(1, 11)) and len(run.starts) == 1
    assert run.start["devices"] == "2 x cpu"
    assert [record["loss"] for record in run.train] == [record["loss"] for record in read_run(alone).train]
    assert sorted("from scratch" in text for text in texts) == [False, True]

    if "mesh.fsdp=2" not in mesh:
        return
    # What two wrote, one goes on from; what one wrote, two go on from.
    more = (*OVERRIDES, *mesh, "steps=12")
    again = launch("pretrain", DEBUG, f"run.dir={together}", *more, devices=2, **cache)
    assert again.returncode == 0 and "resuming at step 10" in again.stdout, again.stdout
    launch_two("pretrain", DEBUG, f"run.dir={alone}", *more, **cache)
    assert_same_bits(read_arrays(together, 12), read_arrays(alone, 12))
