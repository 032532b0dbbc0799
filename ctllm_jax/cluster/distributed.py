"""Several processes as one program: detect the launcher, and report problems that would otherwise hang or fail
silently."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import getproxies_environment, proxy_bypass_environment

from ctllm_jax.cluster.roll_call import Missing, call_roll, is_loopback
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.statuses import REQUEUE

_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_PORT = 61_440
"""First of the 4,096 ports from which a job's number selects one, so that two jobs on a node rarely collide."""
_TPU_VM = ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID")
_TPU_PORT = 8476
"""Where JAX's service listens on TPUs, whose runtime chooses the coordinator."""
ARRIVAL_SECONDS = 900
"""How long the processes wait for each other: nodes are made and images pulled at different speeds."""
_POD_PAUSE = 5
"""Seconds between two attempts to find the name of the first pod."""
_NO_STEP = 4_294_967_290
"""From here on SLURM's numbers of steps are no steps of srun, but a shell that salloc or sbatch gives."""
_PATIENCE = 10
"""Seconds: JAX 0.10 gives up a peer after two thirds of its timeout, and the watchdog needs a few to write stacks."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
      kind: explicit, slurm, openmpi, kubernetes, tpu or local.
      coordinator: host:port of process 0; None for one process, or if TPU's runtime knows it.
      processes, index: how many there are, and which one this is.
      local_devices: numbers of the GPUs of this process; None: all of its machine.
    """

    kind: str
    coordinator: str | None = None
    processes: int = 1
    index: int = 0
    local_devices: tuple[int, ...] | None = None

    @property
    def host(self) -> str:
        """The coordinator's host."""
        return (self.coordinator or "").rpartition(":")[0]

    def describe(self) -> str:
        """One line."""
        if self.processes == 1:
            return f"{self.kind}: one process"
        where = f", coordinator {self.coordinator}" if self.coordinator else ""
        devices = "" if self.local_devices is None else f", its device {', '.join(map(str, self.local_devices))}"
        return f"{self.kind}: process {self.index} of {self.processes}{where}{devices}"


def detect(environment: Mapping[str, str]) -> Launch:
    """The process layout from the environment: the first of these sources that is set.

    | set | by |
    |---|---|
    | JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID (JAX_LOCAL_DEVICE_IDS) | a person, or `processes=N` |
    | OMPI_COMM_WORLD_SIZE | mpirun of Open MPI |
    | SLURM_JOB_ID | sbatch, salloc; SLURM_PROCID by srun |
    | TPU_WORKER_HOSTNAMES | GKE, on TPUs |
    | JOB_COMPLETION_INDEX | an indexed job of Kubernetes, or a JobSet, on GPUs |

    Raises:
      UserError: only some of the three, numbers that make no sense, or several SLURM tasks without srun.
    """
    given = {name: environment[name] for name in _NAMES if environment.get(name)}
    if given:
        return _explicit(given, environment.get("JAX_LOCAL_DEVICE_IDS"))
    if int(environment.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return _open_mpi(environment)
    if "SLURM_JOB_ID" in environment:
        return _slurm(environment)
    hosts = [host for host in environment.get(_TPU_VM[0], "").split(",") if host]
    if hosts and hosts != ["localhost"]:
        slices = _number(environment, "MEGASCALE_NUM_SLICES", default=1)
        index = _number(environment, "MEGASCALE_SLICE_ID", default=0) * len(hosts)
        return Launch("tpu", None, slices * len(hosts), index + _number(environment, _TPU_VM[1]))
    if environment.get("JOB_COMPLETION_INDEX"):
        return _kubernetes(environment)
    return Launch("local")


def initialize(heartbeat_seconds: int = 100, *, arrival_seconds: float = ARRIVAL_SECONDS) -> int:
    """Join the other processes if there are any; returns how many there are. Called before any device is touched; a
    second call does nothing.

    Args:
      heartbeat_seconds: seconds without a heartbeat after which a process counts as dead, and
        `training.supervision.watchdog` names it. JAX, which aborts all others and names none, gets a longer limit.
      arrival_seconds: how long the processes wait for each other.

    Raises:
      Missing: some did not arrive in time; the message names them.
      UserError: as `detect`, or the host name of process 0 does not resolve, for which the runtime would wait silently.
    """
    launch, patience = detect(os.environ), 2 * heartbeat_seconds + _PATIENCE
    if launch.processes > 1 and _is_initialized():
        return launch.processes
    if launch.kind == "local" and on_tpu_vm(os.environ):
        # The other hosts of a slice are known to its metadata server alone, which JAX asks.
        import jax

        if not _is_initialized():
            with _ends_after(arrival_seconds) as timeout:
                jax.distributed.initialize(heartbeat_timeout_seconds=patience, initialization_timeout=timeout)
        log.info("started on a TPU VM: process %d of %d", jax.process_index(), jax.process_count())
        return jax.process_count()
    if launch.processes == 1:
        return 1
    log.info("started by %s", launch.describe())
    end = time.monotonic() + arrival_seconds
    if launch.coordinator is not None:
        _check_name(launch, seconds=arrival_seconds)
        _keep_from_proxies(launch.coordinator)
    call_roll(launch.coordinator or tpu_coordinator(os.environ), index=launch.index, count=launch.processes,
              seconds=max(end - time.monotonic(), 1.0))
    import jax

    with _ends_after(arrival_seconds) as timeout:
        if launch.coordinator is None:
            jax.distributed.initialize(heartbeat_timeout_seconds=patience, initialization_timeout=timeout)
            return launch.processes
        # The service has no authentication: where all processes are on this machine, no other one may reach it.
        bound = is_loopback(launch.host) and not os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
        local = {"coordinator_bind_address": launch.coordinator} if bound else {}
        # Left to detect for itself, JAX gives a process without local_device_ids the GPU of its number on the node: a
        # task that is to have all eight would have one, and say nothing.
        jax.distributed.initialize(launch.coordinator, launch.processes, launch.index,
                                   local_device_ids=launch.local_devices, cluster_detection_method="deactivate",
                                   heartbeat_timeout_seconds=patience, initialization_timeout=timeout, **local)
    return launch.processes


@contextmanager
def _ends_after(seconds: float) -> Iterator[int]:
    """The timeout for JAX to join the others, which it never reaches: it would abort the process, with a status that
    nobody starts again. This process ends before that, so that it is."""
    def end() -> None:
        sys.stderr.write(f"error: JAX did not connect the processes within {seconds:g} s: look at what the others"
                         " wrote, and whether they were started; the same command may be given again\n")
        sys.stderr.flush()
        os._exit(REQUEUE)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield int(seconds) + 60
    finally:
        timer.cancel()


def tpu_coordinator(environment: Mapping[str, str]) -> str:
    """The address of JAX's service for TPUs whose hosts the environment names: the first host of the first slice."""
    host = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or environment[_TPU_VM[0]].split(",")[0]
    return f"{host.partition(':')[0]}:{_TPU_PORT}"


def _is_initialized() -> bool:
    import jax

    return jax.distributed.is_initialized()


def _explicit(given: Mapping[str, str], devices: str | None) -> Launch:
    missing = [name for name in _NAMES if name not in given]
    if missing:
        raise UserError(f"{', '.join(given)} set, but not {', '.join(missing)}: the three go together")
    count, index = given["JAX_NUM_PROCESSES"], given["JAX_PROCESS_ID"]
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise UserError(f"JAX_PROCESS_ID={index} of JAX_NUM_PROCESSES={count}: needs 0 <= id < number")
    if devices and not re.fullmatch(r"\d+(,\d+)*", devices):
        raise UserError(f"JAX_LOCAL_DEVICE_IDS={devices} must be numbers between commas")
    return Launch("explicit", given["JAX_COORDINATOR_ADDRESS"], int(count), int(index),
                  tuple(map(int, devices.split(","))) if devices else None)


def _slurm(environment: Mapping[str, str]) -> Launch:
    tasks = _number(environment, "SLURM_NTASKS", default=1)
    nodes = _number(environment, "SLURM_JOB_NUM_NODES", default=1)
    step = _number(environment, "SLURM_STEP_ID", default=_NO_STEP)
    if step >= _NO_STEP or not environment.get("SLURM_PROCID"):
        # Inside of salloc or sbatch, and not of srun: every task but this one would be missing.
        if max(tasks, nodes) > 1:
            raise UserError(f"SLURM_JOB_ID={environment['SLURM_JOB_ID']} has {nodes} nodes and {tasks} tasks, and this "
                            "process was started without srun: write srun before python, or this would be one process "
                            "on one node")
        return Launch("slurm")
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", default=tasks)
    here = _tasks_here(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    _check_gpus(environment, here)
    if tasks == 1:
        return Launch("slurm")
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    port = _PORT + _number(environment, "SLURM_JOB_ID") % 4096
    return Launch("slurm", f"{first_host(hosts)}:{port}", tasks, _number(environment, "SLURM_PROCID"),
                  _share(environment, here, _number(environment, "SLURM_LOCALID", default=0)))


def _check_gpus(environment: Mapping[str, str], tasks: int) -> None:
    """GPUs of the job on this node that none of its tasks would use."""
    given = environment.get("SLURM_GPUS_ON_NODE", "")
    visible = [device for device in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    if given.isdigit() and visible and len(visible) * tasks < int(given):
        raise UserError(f"the job has {given} GPUs on this node, and its {tasks} task{'s' * (tasks > 1)} see"
                        f"{'s' * (tasks == 1)} {len(visible)}{' each' * (tasks > 1)} (CUDA_VISIBLE_DEVICES="
                        f"{','.join(visible)}): start a task for each with --ntasks-per-node={given}, or let one task"
                        " see all, without --gpus-per-task and --gpu-bind")


def _open_mpi(environment: Mapping[str, str]) -> Launch:
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "") or environment.get("PMIX_SERVER_URI41", "")
    found = re.search(r"tcp[46]?://(\[[^\],]+|[^,:]+)", uri)
    if found is None:
        raise UserError("started by mpirun, which does not say where process 0 is: set JAX_COORDINATOR_ADDRESS, "
                        "JAX_NUM_PROCESSES=$OMPI_COMM_WORLD_SIZE and JAX_PROCESS_ID=$OMPI_COMM_WORLD_RANK")
    job = re.match(r"(\d+)", uri)
    host = f"{found[1]}]" if found[1].startswith("[") else found[1]
    return Launch("openmpi", f"{host}:{_PORT + (int(job[1]) if job else 0) % 4096}",
                  _number(environment, "OMPI_COMM_WORLD_SIZE"), _number(environment, "OMPI_COMM_WORLD_RANK"),
                  _share(environment, _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE", default=1),
                         _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK", default=0)))


def _kubernetes(environment: Mapping[str, str]) -> Launch:
    wanted = ("JOBSET_COORDINATOR", "JOBSET_PROCESSES")
    missing = [name for name in wanted if not environment.get(name)]
    if missing:
        raise UserError(f"JOB_COMPLETION_INDEX is set by Kubernetes, but not {' and '.join(missing)}: set "
                        "JOBSET_COORDINATOR to host:port of pod 0 and JOBSET_PROCESSES to the number of pods")
    return Launch("kubernetes", environment[wanted[0]], _number(environment, wanted[1]),
                  _number(environment, "JOB_COMPLETION_INDEX"))


def first_host(hosts: str) -> str:
    """The first name of a SLURM node list: `n[003-007,9],m1` -> n003."""
    match = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\]([^,]*))?", hosts)
    return match[1] + (match[2] or "") + (match[3] or "")


def _tasks_here(tasks: str) -> int:
    """The largest number of tasks on a node: `2(x3),1` -> 2."""
    return max([int(number) for number in re.findall(r"(\d+)(?:\(x\d+\))?(?:,|$)", tasks)] or [1])


def _share(environment: Mapping[str, str], tasks: int, index: int) -> tuple[int, ...] | None:
    """One task a node has all of its GPUs; with several, each has those of its number, unless it sees no others."""
    visible = [device for device in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    if tasks == 1 or len(visible) == 1:
        return None
    each = max(1, len(visible) // tasks)
    return tuple(range(index * each, (index + 1) * each))


def count_gpus(environment: Mapping[str, str]) -> int:
    """The number of NVIDIA GPUs that a process would see, without a driver call; 0 if JAX will use another platform."""
    if environment.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return 0
    if not any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")):
        return 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def on_tpu_vm(environment: Mapping[str, str]) -> bool:
    """Whether TPUs are here, and somebody who can be asked whether there are others."""
    if environment.get("TPU_SKIP_MDS_QUERY") or environment.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    here = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return here and importlib.util.find_spec("libtpu") is not None


def _number(environment: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    value = environment.get(name)
    if not value and default is not None:
        return default
    if not value or not value.isdigit():
        raise UserError(f"{name}={value} must be a number")
    return int(value)


def _check_name(launch: Launch, *, seconds: float = ARRIVAL_SECONDS) -> None:
    host, _, port = launch.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"the coordinator {launch.coordinator} must be host:port")
    # A pod's name is known when it has an address, which the first may have later than this one.
    end = time.monotonic() + (seconds if launch.kind == "kubernetes" else 0)
    while True:
        try:
            socket.getaddrinfo(host.strip("[]"), int(port))
            return
        except OSError as error:
            if time.monotonic() < end:
                log.info("waiting for %s to have an address", host)
                time.sleep(_POD_PAUSE)
                continue
            problem = Missing if launch.kind == "kubernetes" else UserError  # a pod may still get its node
            raise problem(f"the coordinator {launch.coordinator} cannot be found ({error.strerror or error}): its "
                          "name must be known on every machine, or be an address") from None


def _keep_from_proxies(coordinator: str) -> None:
    """gRPC would send the processes' own traffic through a proxy of the environment, which does not pass it on."""
    proxies = getproxies_environment()
    if not {"http", "https", "grpc"} & set(proxies) or proxy_bypass_environment(coordinator, proxies):
        return
    host = coordinator.rpartition(":")[0].strip("[]")
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name, ""), host]))
    log.warning("a proxy is set, and processes reach each other without one: %s was added to no_proxy", host)


def tell_all(number: int) -> int:
    """The number that the first process gives, on every process; all of them call this, at the same point."""
    import jax

    if jax.process_count() == 1:
        return number
    import numpy as np
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def tell_all_of(numbers: Sequence[int]) -> list[int]:
    """The numbers that the first process gives, on every process; as `tell_all`."""
    import jax

    if jax.process_count() == 1:
        return list(numbers)
    import numpy as np
    from jax.experimental import multihost_utils

    told = np.zeros(tell_all(len(numbers)), np.int32)
    if jax.process_index() == 0:
        told[:] = numbers
    return multihost_utils.broadcast_one_to_all(told).tolist() if len(told) else []
