"""The checks of `launch.py doctor`: each examines one thing, and says what to do about a problem.

Those of CHILDREN import jax, and are called in a process of their own; the others may not.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.request import getproxies_environment, proxy_bypass_environment

from ctllm_jax.cluster import compilation_cache, distributed, hardware, xla_flags
from ctllm_jax.config.axes import TENSOR
from ctllm_jax.config.errors import UserError
from ctllm_jax.preflight.data_checks import check_dataset, check_tokenizer
from ctllm_jax.preflight.findings import FAIL, OK, WARN, Finding, Subject

SKEW = 2.0
"""Seconds by which a file server's clock may differ: enough for its cache, less than a checkpoint's interval."""
_PYTHON = (3, 11)
_UNKNOWN = re.compile(r"Unknown (?:command line )?flags? (?:in XLA_FLAGS: )?'?(?:--)?([\w-]+)")
_ILLEGAL = re.compile(r"Illegal value '([^']*)' specified for flag '([\w-]+)'")


def check_versions(subject: Subject) -> list[Finding]:
    """Python, and the packages that must be of one version."""
    version = _version
    jax, jaxlib, found = version("jax"), version("jaxlib"), []
    if sys.version_info < _PYTHON:
        return [Finding("versions", FAIL, f"Python {sys.version.split()[0]}", "install Python 3.11 or 3.12")]
    if jax is None or jaxlib is None:
        return [Finding("versions", FAIL, f"jax {jax}, jaxlib {jaxlib}", "pip install -c constraints/py311.txt -e .")]
    if jax != jaxlib:
        found.append(Finding("versions", FAIL, f"jax {jax} beside jaxlib {jaxlib}",
                             f"pip install jax=={jax} jaxlib=={jax}"))
    needs = importlib.metadata.requires("jax") or ()
    wanted = next((line.partition("==")[2].partition(";")[0].strip() for line in needs if line.startswith("libtpu==")),
                  None)
    libtpu = version("libtpu")
    if libtpu and wanted and not fnmatch(libtpu, wanted):
        found.append(Finding("versions", FAIL, f"libtpu {libtpu}, and jax {jax} goes with {wanted}",
                             "pip install -U 'ctllm-jax[tpu]'"))
    shown = ", ".join(f"{name} {version(name)}" for name in ("jax", "libtpu", "flax", "orbax-checkpoint", "ctllm_jax")
                      if version(name))
    return found or [Finding("versions", OK, f"Python {sys.version.split()[0]}, {shown}")]


def check_driver(subject: Subject) -> list[Finding]:
    """NVIDIA's driver, and the CUDA that is installed for it. Nothing if there is no driver."""
    driver = hardware.nvidia_driver()
    if driver is None:
        return []
    shown, extra = ".".join(map(str, driver)), hardware.cuda_extra(driver)
    plugins = {name: _version(f"jax-{name}-plugin") for name in ("cuda12", "cuda13")}
    installed = {name: number for name, number in plugins.items() if number}
    if extra is None:
        return [Finding("driver", FAIL, f"NVIDIA driver {shown}", "update it to 525 (CUDA 12) or 580 (CUDA 13)")]
    if not installed:
        return [Finding("driver", FAIL, f"NVIDIA driver {shown}, and no CUDA for jax",
                        f"pip install 'ctllm-jax[{extra}]'")]
    if "cuda12" in installed and "cuda13" in installed:
        return [Finding("driver", FAIL, "both cuda12 and cuda13 are installed, and jax takes one at random",
                        f"pip uninstall jax-{'cuda12' if extra == 'cuda13' else 'cuda13'}-plugin")]
    name, number = next(iter(installed.items()))
    if name == "cuda13" and extra == "cuda12":
        return [Finding("driver", FAIL, f"NVIDIA driver {shown} is too old for cuda13",
                        "pip install 'ctllm-jax[cuda12]', or update the driver to 580")]
    if number != _version("jaxlib"):
        return [Finding("driver", FAIL, f"jax-{name}-plugin {number} beside jaxlib {_version('jaxlib')}",
                        f"pip install -U 'ctllm-jax[{name}]'")]
    return [Finding("driver", OK, f"NVIDIA driver {shown}, jax-{name}-plugin {number}")]


def check_processes(subject: Subject) -> list[Finding]:
    """The launcher of the processes, and whether they can find each other."""
    try:
        launch = distributed.detect(subject.environment)
    except UserError as error:
        return [Finding("processes", FAIL, str(error), "as the message says; or unset these variables")]
    found = []
    if launch.coordinator is not None and launch.processes > 1:
        found += _check_coordinator(launch)
        proxies = getproxies_environment()
        if {"http", "https", "grpc"} & set(proxies) and not proxy_bypass_environment(launch.coordinator, proxies):
            host = launch.coordinator.rpartition(":")[0]
            found.append(Finding("network", WARN, "a proxy is set, and it does not pass the processes' traffic on",
                                 f"export no_proxy={host} (launch.py adds it, other tools do not)"))
    return [Finding("processes", OK, launch.describe()), *found]


def _check_coordinator(launch: distributed.Launch) -> list[Finding]:
    host, _, port = launch.coordinator.rpartition(":")
    if not host or not port.isdigit():
        return [Finding("network", FAIL, f"coordinator {launch.coordinator}", "JAX_COORDINATOR_ADDRESS=HOST:PORT")]
    try:
        address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    except OSError as error:
        return [Finding("network", FAIL, f"coordinator {launch.coordinator} cannot be found: {error.strerror or error}",
                        "name a host that every machine knows, or its address: JAX_COORDINATOR_ADDRESS=HOST:PORT")]
    if launch.index == 0:
        with socket.socket(address[0], socket.SOCK_STREAM) as own:
            try:
                own.bind(address[4])
            except OSError as error:
                what = "is taken" if error.errno == errno.EADDRINUSE else "is no address of this machine"
                return [Finding("network", FAIL, f"process 0 is to listen at {launch.coordinator}, which {what}",
                                "choose another port, or start process 0 on that host")]
    return [Finding("network", OK, f"coordinator {launch.coordinator} is {address[4][0]}")]


def check_flags(subject: Subject) -> list[Finding]:
    """XLA's flags, as a run would have them, given to the jaxlib and libtpu that are installed."""
    found = []
    misplaced = [name for name in xla_flags.own_flags(subject.environment, xla_flags.GPU_VARIABLE)
                 if name.startswith("xla_tpu_")]
    if misplaced:
        return [Finding("flags", FAIL, f"{', '.join(misplaced)} in XLA_FLAGS, where it ends every process",
                        f"move it to {xla_flags.TPU_VARIABLE}")]
    for variable, package, program in ((xla_flags.GPU_VARIABLE, "jaxlib", _ASK_JAXLIB),
                                       (xla_flags.TPU_VARIABLE, "libtpu", _ASK_LIBTPU)):
        if not subject.environment.get(variable) or _version(package) is None:
            continue
        own = {name: value for name, value in subject.environment.items()
               if name not in (xla_flags.GPU_VARIABLE, xla_flags.TPU_VARIABLE)}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False,
                              env={**own, variable: subject.environment[variable], **_AOT})
        if unknown := _UNKNOWN.search(done.stderr):
            found.append(Finding("flags", FAIL, f"{variable} has {unknown[1]}, which {package} {_version(package)} "
                                                "does not know", f"take it out of {variable}"))
        elif illegal := _ILLEGAL.search(done.stderr):
            found.append(Finding("flags", FAIL, f"{variable}: {illegal[2]}={illegal[1]} is no value of it",
                                 f"correct it in {variable}"))
        elif done.returncode:
            found.append(Finding("flags", FAIL, f"{variable} is not taken: {_last_line(done.stderr)}",
                                 f"take out its flags one by one: unset {variable}"))
    shown = f"{xla_flags.describe_flags(subject.environment)}"
    return found or [Finding("flags", OK, shown)]


_AOT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}
_ASK_JAXLIB = "from jaxlib import xla_client; xla_client.make_cpu_client()"
_ASK_LIBTPU = ("from jax.experimental import topologies; "
               "topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')")


def check_cache(subject: Subject) -> list[Finding]:
    """The cache of compiled programs, which are run unchecked."""
    directory = compilation_cache.choose_directory("off", run_dir="", environment=subject.environment)
    if directory is None or "://" in directory:
        return [Finding("programs", OK, compilation_cache.describe_directory(subject.environment))]
    path = Path(directory)
    if path.exists() and path.stat().st_mode & stat.S_IWOTH:
        return [Finding("programs", WARN, f"{directory}: whoever writes there runs code in your next start, and "
                        "everyone may", f"chmod o-w {directory}")]
    return [Finding("programs", OK, compilation_cache.describe_directory(subject.environment))]


def check_devices(subject: Subject) -> list[Finding]:
    """The devices that jax finds, and the implementations for them. Runs in a separate process."""
    launch = distributed.detect(subject.environment)
    here = hardware.find_accelerators({name: value for name, value in subject.environment.items()
                                       if name != "JAX_PLATFORMS"})
    if launch.kind == "tpu" and launch.processes > 1:
        return [Finding("devices", OK, f"{here.count} x {here.chip} by its bus; TPUs of several hosts start together")
                if here else Finding("devices", FAIL, "no TPU on this host's bus", "ask for a TPU node")]
    import jax

    devices = jax.devices()
    kind, platform = devices[0].device_kind, devices[0].platform
    shown = f"{len(devices)} x {kind}, {len(os.sched_getaffinity(0))} processors"
    if platform == "cpu" and here is not None:
        chosen = subject.environment.get("JAX_PLATFORMS", "")
        extra = "tpu" if here.platform == "tpu" else hardware.cuda_extra(hardware.nvidia_driver() or (580,)) or "cuda12"
        fix = f"unset JAX_PLATFORMS (it is {chosen})" if chosen else f"pip install 'ctllm-jax[{extra}]'"
        found = [Finding("devices", FAIL, f"{shown}, though {here.count} x {here.chip or here.platform} are here", fix)]
    else:
        found = [Finding("devices", OK, shown)]
    if subject.config is None or subject.config.model is None:
        return found
    return [*found, *_check_run(subject, devices, processes=launch.processes)]


def _check_run(subject: Subject, devices: list[Any], *, processes: int) -> list[Finding]:
    """The mesh, the implementation of every op, and the memory of each device.

    Of several processes each sees its own devices here, and the mesh is theirs together: it is left to the start.
    """
    from ctllm_jax import sharding
    from ctllm_jax.cluster.chips import find_chip
    from ctllm_jax.preflight.plan import axis_sizes, memory_bytes
    from ctllm_jax.training.environment import choose_implementations

    config = subject.config
    count = len(devices) * processes
    try:
        split = max(count // axis_sizes(config, devices=count)[TENSOR], 1)
        if processes == 1:
            split = sharding.axis_size(sharding.make_mesh(config.mesh.model_dump()), sharding.BATCH_AXES)
        found = [Finding("ops", OK, ", ".join(f"{op}: {name}" for op, name in choose_implementations(config).items()))]
    except UserError as error:
        return [Finding("ops", FAIL, str(error), "as the message says")]
    if processes == 1 and config.batch.rows % split:
        return [*found, Finding("memory", FAIL, f"batch.tokens={config.batch.tokens}: {config.batch.rows} rows do not "
                                f"divide among {split} devices", "choose batch.tokens so that they do")]
    rows = max(1, config.batch.rows // split)
    rows = min(config.batch.rows_per_device or rows, rows)
    sizes = memory_bytes(config, devices=count, rows=rows)
    need, chip = sum(sizes.values()), find_chip(devices[0].device_kind)
    room = chip.memory_gib * 2**30 if chip else _available_memory() / len(devices)
    text = f"about {_gib(need)} of {_gib(room)} on each device, by arithmetic (compile gives the real figure)"
    if need > room:
        fix = "lower batch.rows_per_device, then compute.remat=block, then raise mesh.fsdp"
        return [*found, Finding("memory", FAIL, text, fix)]
    return [*found, Finding("memory", OK, text) if need < 0.9 * room else
            Finding("memory", WARN, text, "close: ask python launch.py compile CONFIG topology=…")]


def check_checkpoints(subject: Subject) -> list[Finding]:
    """The run directory: writable, with room for two checkpoints (one is written while another is kept)."""
    if subject.config is None:
        return []
    from ctllm_jax.preflight.plan import checkpoint_bytes, free_disk

    directory = subject.config.run.dir
    if "://" in directory:
        return [Finding("checkpoints", FAIL, f"run.dir={directory} is no file system",
                        "mount the bucket (job gke does), and give the mounted path")]
    place = Path(directory).absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            file.write(b"doctor")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return [Finding("checkpoints", FAIL, f"{place} cannot be written: {error.strerror}",
                        "run.dir=DIR that you may write to, on every machine")]
    if subject.config.model is None:
        return [Finding("checkpoints", OK, f"{place} can be written; how large they are says the model of init")]
    need, free = 2 * checkpoint_bytes(subject.config)["resumable"], free_disk(place)
    if need > free:
        return [Finding("checkpoints", FAIL, f"two checkpoints take {_gib(need)}, and {place} has {_gib(free)} free",
                        "run.dir=DIR on a larger disk, or make room")]
    return [Finding("checkpoints", OK, f"{place} can be written; two take {_gib(need)} of {_gib(free)} free")]


def check_clock(subject: Subject) -> list[Finding]:
    """This machine's clock against the file system's, and against the time that this file was made."""
    place = Path(subject.config.run.dir if subject.config is not None and "://" not in subject.config.run.dir else ".")
    while not place.exists():
        place = place.absolute().parent
    now = time.time()
    if now < Path(__file__).stat().st_mtime - 86_400:
        return [Finding("clock", FAIL, f"it says {time.strftime('%Y-%m-%d %H:%M')}, and this program is younger",
                        "set it: chronyc makestep, or sudo hwclock --hctosys")]
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            skew = os.stat(file.name).st_mtime - now
    except OSError:
        return [Finding("clock", OK, time.strftime("%Y-%m-%d %H:%M %Z"))]
    if abs(skew) > SKEW:
        return [Finding("clock", WARN, f"{place} is {skew:+.1f} s from this machine: times of files will mislead",
                        "let both follow one time server (chronyc tracking)")]
    return [Finding("clock", OK, f"{time.strftime('%Y-%m-%d %H:%M %Z')}, {place} within {SKEW:g} s")]


CHECKS: dict[str, Callable[[Subject], list[Finding]]] = {
    "versions": check_versions, "driver": check_driver, "processes": check_processes, "flags": check_flags,
    "programs": check_cache, "devices": check_devices, "dataset": check_dataset, "tokenizer": check_tokenizer,
    "checkpoints": check_checkpoints, "clock": check_clock}
CHILDREN = ("flags", "devices", "dataset")


def explain_death(name: str, errors: str, status: int) -> list[Finding]:
    """The finding of a check whose process ended without an answer."""
    if unknown := _UNKNOWN.search(errors):
        return [Finding(name, FAIL, f"jax does not start: unknown flag {unknown[1]}", "see flags")]
    return [Finding(name, FAIL, f"ended with status {status}: {_last_line(errors)}", "start python -c 'import jax; "
                    "print(jax.devices())' to see the whole message")]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _available_memory() -> int:
    """Bytes of memory that this machine can still give, within its cgroup."""
    limit = sys.maxsize
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text()) - int(
            Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        pass
    free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return min(limit, int(free[1]) * 1024 if free else sys.maxsize)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.1f} MiB"
