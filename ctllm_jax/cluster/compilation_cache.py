"""The folder of JAX's compilation cache, set in the environment before jax is imported. No jax.

By default it is enabled where it is safe, next to the run directory, which all processes of a run share. It is not
safe:

- on CPUs: a program there is machine code for the very processor that compiled it, and its key does not say which. On
  a shared file system another one takes it, and may stop at an instruction that it has not;
- in a directory that each host has for itself: only process 0 writes (jax._src.compiler), so that at the next start it
  alone does not compile, where processes on GPUs share the work of autotuning.

Cached programs are run unchecked: anyone who can write to the directory can run code at the next start.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from ctllm_jax.cluster.hardware import find_accelerators

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
FOLDER = ".compilation_cache"
_SWITCH = "JAX_ENABLE_COMPILATION_CACHE"


def choose_directory(setting: str, *, run_dir: str, environment: Mapping[str, str]) -> str | None:
    """The directory for `compute.compilation_cache`, None for none; the user's own variable decides before it."""
    if environment.get(_SWITCH, "").lower() in ("0", "false", "no", "off"):
        return None
    if environment.get(VARIABLE):
        return environment[VARIABLE]
    if setting != "auto":
        return None if setting == "off" else setting
    if find_accelerators(environment) is None:
        return None
    parent, slash, _ = run_dir.rstrip("/").rpartition("/")
    return f"{parent}{slash}{FOLDER}"


def set_directory(environment: MutableMapping[str, str], setting: str, *, run_dir: str) -> str | None:
    """Choose the directory, and set it for a JAX that is imported later."""
    directory = choose_directory(setting, run_dir=run_dir, environment=environment)
    if directory is not None:
        environment[VARIABLE] = directory
    return directory


def describe_directory(environment: Mapping[str, str]) -> str:
    """One line for the banner."""
    directory = choose_directory("off", run_dir="", environment=environment)
    if directory is not None:
        return f"kept in {directory}"
    return "not kept" if find_accelerators(environment) else "not kept (CPU)"
