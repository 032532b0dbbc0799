"""What the environment says of other processes, and what is said of an environment that makes no sense."""

import socket
import subprocess
import sys

import pytest

from ctllm_jax.cli import main
from ctllm_jax.cluster import distributed
from ctllm_jax.cluster.roll_call import Missing
from ctllm_jax.config.errors import UserError
from tests.runs import REPOSITORY, environment

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture
def given(monkeypatch):
    """Sets the three variables (None: not at all), and records what jax would be told."""
    import jax

    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **options: calls.append((arguments, options)))
    monkeypatch.setattr(distributed, "call_roll", lambda address, **options: None)
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)

    def give(*values):
        for name, value in zip(NAMES, values, strict=True):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        return calls

    return give


def test_nothing_set_is_one_process(given):
    calls = given(None, None, None)
    assert distributed.initialize() == 1 and not calls


def test_one_process_of_one_needs_no_others(given):
    calls = given("host:1234", "1", "0")
    assert distributed.initialize() == 1 and not calls


def test_all_three(given):
    calls = given("127.0.0.1:1234", "4", "3")
    assert distributed.initialize() == 4
    assert calls[0][0][:3] == ("127.0.0.1:1234", 4, 3)


@pytest.mark.parametrize(("coordinator", "bound"), [
    ("127.0.0.1:1234", "127.0.0.1:1234"), ("localhost:1234", "localhost:1234"), ("[::1]:1234", "[::1]:1234"),
    ("0.0.0.0:1234", None)])
def test_the_coordinator_of_one_machine_listens_to_that_machine_alone(given, monkeypatch, coordinator, bound):
    calls = given(coordinator, "2", "0")
    distributed.initialize()
    assert calls[0][1].get("coordinator_bind_address") == bound
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "[::]:1234")
    distributed.initialize()
    assert "coordinator_bind_address" not in calls[1][1]


@pytest.mark.parametrize(("values", "missing"), [
    (("host:1234", None, None), "JAX_NUM_PROCESSES, JAX_PROCESS_ID"), (("host:1234", "2", None), "not JAX_PROCESS_ID"),
    ((None, "2", "0"), "not JAX_COORDINATOR_ADDRESS"), (("", "2", "0"), "not JAX_COORDINATOR_ADDRESS")])
def test_only_some_of_the_three(given, values, missing):
    calls = given(*values)
    with pytest.raises(UserError, match=missing):
        distributed.initialize()
    assert not calls


@pytest.mark.parametrize(("count", "index"), [("2", "2"), ("2", "-1"), ("0", "0"), ("two", "0"), ("2", "1.0")])
def test_numbers_that_make_no_sense(given, count, index):
    calls = given("host:1234", count, index)
    with pytest.raises(UserError, match=f"JAX_PROCESS_ID={index} of JAX_NUM_PROCESSES={count}: needs 0 <= id < number"):
        distributed.initialize()
    assert not calls


def test_a_user_reads_a_line_and_no_traceback(given, tmp_path, capsys):
    given("host:1234", "2", "5")
    assert main(["pretrain", "debug/pretrain", f"run.dir={tmp_path / 'run'}"]) == 2
    assert "error: JAX_PROCESS_ID=5 of JAX_NUM_PROCESSES=2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


SLURM = {"SLURM_JOB_ID": "4099", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0",
         "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "gpu[03-04]",
         "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}


def test_one_task_a_node_sees_all_of_its_gpus():
    launch = distributed.detect(SLURM)
    assert launch == distributed.Launch("slurm", "gpu03:61443", 2, 1, None)
    assert launch.describe() == "slurm: process 1 of 2, coordinator gpu03:61443"


def test_a_task_a_gpu_sees_its_own():
    launch = distributed.detect(SLURM | {"SLURM_NTASKS": "16", "SLURM_PROCID": "11", "SLURM_LOCALID": "3",
                                         "SLURM_STEP_TASKS_PER_NODE": "8(x2)"})
    assert (launch.processes, launch.index, launch.local_devices) == (16, 11, (3,))


def test_an_allocation_without_srun_is_refused():
    inside = {name: value for name, value in SLURM.items() if "STEP" not in name and name != "SLURM_PROCID"}
    with pytest.raises(UserError, match="2 nodes and 2 tasks, and this process was started without srun"):
        distributed.detect(inside)
    alone = inside | {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}
    assert distributed.detect(alone) == distributed.Launch("slurm")


@pytest.mark.parametrize(("hosts", "first"), [
    ("node001", "node001"), ("node001,host2", "node001"), ("node[001-0015],host2", "node001"),
    ("node[001,007-015]", "node001"), ("n[3-4]-ib,m", "n3-ib")])
def test_the_first_of_a_node_list(hosts, first):
    assert distributed.first_host(hosts) == first


def test_open_mpi_says_where_it_was_started():
    launch = distributed.detect({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2",
                                 "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                                 "OMPI_MCA_orte_hnp_uri": "1234501632.0;tcp://10.96.0.1,10.148.0.1:34911"})
    assert launch.coordinator.startswith("10.96.0.1:") and (launch.processes, launch.index) == (4, 2)
    assert launch.local_devices == (0,)


def test_tpu_hosts_are_left_to_their_runtime():
    launch = distributed.detect({"TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3", "TPU_WORKER_ID": "2"})
    assert launch == distributed.Launch("tpu", None, 4, 2)
    assert distributed.detect({"TPU_WORKER_HOSTNAMES": "localhost"}).processes == 1


def test_pods_of_an_indexed_job():
    pod = {"JOB_COMPLETION_INDEX": "3", "JOBSET_COORDINATOR": "run-0-0.run:1234", "JOBSET_PROCESSES": "8"}
    assert distributed.detect(pod) == distributed.Launch("kubernetes", "run-0-0.run:1234", 8, 3)
    with pytest.raises(UserError, match="not JOBSET_COORDINATOR and JOBSET_PROCESSES"):
        distributed.detect({"JOB_COMPLETION_INDEX": "3"})


def test_a_name_that_nobody_knows_is_said_at_once(given):
    calls = given("no-such-host.invalid:1234", "2", "0")
    with pytest.raises(UserError, match="no-such-host.invalid:1234 cannot be found"):
        distributed.initialize()
    assert not calls


def test_a_proxy_is_kept_out_of_the_way(given, monkeypatch, caplog):
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:3128")
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("NO_PROXY", "")
    given("127.0.0.1:1234", "2", "0")
    assert distributed.initialize() == 2
    import os

    assert os.environ["no_proxy"] == "example.org,127.0.0.1" and "127.0.0.1 was added to no_proxy" in caplog.text


def test_mpirun_inside_of_an_allocation_is_what_counts():
    inside = {name: value for name, value in SLURM.items() if "STEP" not in name} | {"SLURM_NTASKS": "1"}
    mpi = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
           "OMPI_COMM_WORLD_LOCAL_RANK": "5", "OMPI_MCA_orte_hnp_uri": "7.0;tcp6://[fe80::b9b:1]:34911"}
    launch = distributed.detect(inside | mpi)
    assert (launch.kind, launch.processes, launch.index) == ("openmpi", 8, 5)
    assert launch.coordinator.startswith("[fe80::b9b:1]:")


def test_the_shell_of_an_allocation_is_no_step():
    with pytest.raises(UserError, match="started without srun"):
        distributed.detect(SLURM | {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"})


@pytest.mark.parametrize(("visible", "devices"), [("3", None), ("0,1,2,3,4,5,6,7", (2, 3)), ("", (1,))])
def test_tasks_of_a_node_share_its_gpus(visible, devices):
    launch = distributed.detect(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_LOCALID": "1",
                                         "SLURM_NTASKS": "8", "CUDA_VISIBLE_DEVICES": visible})
    assert launch.local_devices == devices


def test_slices_of_tpus_are_counted():
    launch = distributed.detect({"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "4",
                                 "MEGASCALE_SLICE_ID": "2"})
    assert (launch.processes, launch.index) == (8, 5)


def test_jax_is_not_left_to_guess_a_gpu(monkeypatch):
    """Under SLURM it gives a process that names no devices the one GPU of its number on the node."""
    import jax

    calls, rolls = [], []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **options: calls.append(options))
    monkeypatch.setattr(distributed, "call_roll", lambda address, **options: rolls.append((address, options)))
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    for name, value in (SLURM | {"SLURM_STEP_NODELIST": "127.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    assert distributed.initialize(30) == 2
    # JAX aborts with no word of who is gone: the watchdog, which names it, is to be first.
    assert calls == [{"local_device_ids": None, "cluster_detection_method": "deactivate",
                      "heartbeat_timeout_seconds": 70, "initialization_timeout": 960,
                      "coordinator_bind_address": "127.0.0.1:61443"}]
    (address, options), = rolls
    assert address == "127.0.0.1:61443" and (options["index"], options["count"]) == (1, 2)
    assert 890 < options["seconds"] <= 900


@pytest.mark.parametrize(("more", "coordinator"), [
    ({}, "t0:8476"), ({"MEGASCALE_COORDINATOR_ADDRESS": "slice-0.host:8080"}, "slice-0.host:8476")])
def test_where_the_hosts_of_tpus_meet(more, coordinator):
    """As jax 0.10's clusters.cloud_tpu_cluster chooses the coordinator."""
    assert distributed.tpu_coordinator({"TPU_WORKER_HOSTNAMES": "t0,t1"} | more) == coordinator


def test_jax_that_never_connects_ends_with_the_status_of_a_requeue():
    """A process of its own, since the process ends: JAX would abort it with SIGABRT."""
    code = ("import time\nfrom ctllm_jax.cluster.distributed import _ends_after\n"
            "with _ends_after(0.1) as timeout:\n    assert timeout == 60\n    time.sleep(60)")
    done = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=REPOSITORY, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 75 and "did not connect the processes within 0.1 s" in done.stderr, done.stderr


@pytest.mark.parametrize(("tasks", "visible", "message"), [
    ("1(x2)", "0", "the job has 8 GPUs on this node, and its 1 task sees 1 (CUDA_VISIBLE_DEVICES=0)"),
    ("2(x2)", "0,1", "its 2 tasks see 2 each"), ("1(x2)", "0,1,2,3,4,5,6,7", None), ("8(x2)", "0", None),
    ("8(x2)", "0,1,2,3,4,5,6,7", None), ("1(x2)", "", None)])
def test_gpus_that_no_task_would_use(tasks, visible, message):
    given = SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": visible}
    if message is None:
        assert distributed.detect(given).processes == 2
    else:
        with pytest.raises(UserError) as refused:
            distributed.detect(given)
        assert message in str(refused.value) and "--ntasks-per-node=8" in str(refused.value)


def test_one_task_alone_is_told_of_the_gpus_it_leaves():
    alone = SLURM | {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "1",
                     "SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0"}
    with pytest.raises(UserError, match="has 4 GPUs on this node, and its 1 task sees 1"):
        distributed.detect(alone)


def test_devices_may_be_named_beside_the_three(given, monkeypatch):
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "2,3")
    calls = given("127.0.0.1:1234", "2", "1")
    assert distributed.initialize() == 2 and calls[0][1]["local_device_ids"] == (2, 3)
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "two")
    with pytest.raises(UserError, match="JAX_LOCAL_DEVICE_IDS=two must be numbers"):
        distributed.initialize()


def test_the_first_pod_is_waited_for_and_a_name_elsewhere_is_not(monkeypatch):
    """Pods start in any order; a wrong name in a cluster with fixed names stays wrong."""
    looks = []

    def getaddrinfo(host, port):
        looks.append((host, port))
        if len(looks) < 3:
            raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(distributed.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(distributed, "_POD_PAUSE", 0)
    distributed._check_name(distributed.Launch("kubernetes", "run-worker-0-0.run:8476", 2, 1))
    assert looks == [("run-worker-0-0.run", 8476)] * 3
    looks.clear()
    with pytest.raises(Missing, match="cannot be found"):  # it may still get its node: a machine starts it again
        distributed._check_name(distributed.Launch("kubernetes", "run-worker-0-0.run:8476", 2, 1), seconds=0)
    looks.clear()
    with pytest.raises(UserError, match="cannot be found"):
        distributed._check_name(distributed.Launch("slurm", "n1:1234", 2, 1))
    assert len(looks) == 1
