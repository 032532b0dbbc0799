"""XLA's flags per chip, set in the environment before jax is imported; the user's own flags come last and take
precedence. No jax.

TPU's compiler reads LIBTPU_INIT_ARGS, the GPU's XLA_FLAGS. In the wrong variable a flag aborts the process: jaxlib
knows no `xla_tpu_*`. `launch.py` calls `set_flags`; importing this changes nothing. tests/cluster/test_xla_flags.py
gives every flag to the installed jaxlib and libtpu, so that one which went away is noticed there and not on a slice.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from ctllm_jax.cluster.hardware import find_accelerators

Flag = int | bool | str
GPU_VARIABLE, TPU_VARIABLE = "XLA_FLAGS", "LIBTPU_INIT_ARGS"
# TPU's compiler gathers small weights by an all-reduce of zeros and parts, synchronous and of twice the bytes; this
# keeps them gathers. Measured on the 2B step for v5e:16x16 with libtpu 0.0.42: attention's weights (32 MiB a layer and
# pass) became asynchronous gathers, and every weight's gather overlaps matmuls; v4, v5p and v6e ignore it. OpenXLA's
# three flags for gathering ahead (xla_tpu_enable_ici_ag_pipelining and its companions) hid less there, for 2 GiB more
# of temporaries and twice the compilation. What guides also name for TPUs changed neither memory nor collectives where
# it was tried: the parts of async_collective_fusion (v5e, v6e), data_parallel_all_reduce_opt (two slices), relayouts
# for reduce-scatter (v5e).
_V5E: dict[str, Flag] = {"xla_tpu_prefer_async_allgather_to_allreduce": True}
# One collective for the weights of a layer (0.2 GiB of float32 in the 2B) in place of one a matrix; OpenXLA's guide
# asks for a threshold of a layer or more, NVIDIA's JAX-Toolbox takes 8 GiB. Measured on the 2B step for 8 x H100 with
# jaxlib 0.10.2: 1,032 gathers a step became 260, of the same bytes, in the same memory. The latency-hiding scheduler is
# on by itself (the same program); pipelined collectives took 43 % more memory (6.83 -> 9.78 GiB): left to the user.
_HOPPER: dict[str, Flag] = {
    "xla_gpu_all_gather_combine_threshold_bytes": 2**30,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 2**30,
    "xla_gpu_all_reduce_combine_threshold_bytes": 2**30,
}


@dataclass(frozen=True)
class Preset:
    """Flags of a chip.

    Attributes:
      name: as the banner shows it.
      variable: the environment variable that its compiler reads.
      flags: without dashes and with typed values, as `compile(compiler_options=)` takes them.
    """

    name: str
    variable: str
    flags: dict[str, Flag]

    @property
    def texts(self) -> dict[str, str]:
        """Values as the variable holds them."""
        return {name: str(value).lower() if isinstance(value, bool) else str(value)
                for name, value in self.flags.items()}


def preset_for(chip: str) -> Preset | None:
    """The preset of a chip of `ctllm_jax.cluster.chips`; None if no flag is known to help."""
    if chip == "v5e":
        return Preset(chip, TPU_VARIABLE, dict(_V5E))
    return Preset(chip, GPU_VARIABLE, dict(_HOPPER)) if chip in ("h100", "h200") else None


def flags_for(chip: str) -> dict[str, Flag]:
    """Flag -> value for a chip; empty if no flag is known to help. A pure function."""
    preset = preset_for(chip)
    return {} if preset is None else preset.flags


def own_flags(environment: Mapping[str, str], variable: str) -> dict[str, str]:
    """Parse a variable: flag -> value, the last of a name counts; a flag without a value is "true"."""
    try:
        words = shlex.split(environment.get(variable, ""))
    except ValueError:
        words = environment.get(variable, "").split()
    pairs = (word.lstrip("-").partition("=") for word in words if word.startswith("--"))
    return {name: value if sign else "true" for name, sign, value in pairs}


def compiler_options(chip: str, environment: Mapping[str, str]) -> dict[str, Flag]:
    """The preset for one compilation (`compile(compiler_options=)`), without the flags of the user's environment."""
    preset = preset_for(chip)
    if preset is None:
        return {}
    own = own_flags(environment, preset.variable)
    return {name: value for name, value in preset.flags.items() if name not in own}


def preset_here(environment: Mapping[str, str]) -> Preset | None:
    """The preset of the chips of this machine."""
    here = find_accelerators(environment)
    return None if here is None else preset_for(here.chip)


def set_flags(environment: MutableMapping[str, str], setting: str) -> Preset | None:
    """Put the preset of this machine's chips before the user's own flags; `setting` is `compute.xla_flags`.

    Twice is as once, so that a process may start another.
    """
    preset = preset_here(environment) if setting == "auto" else None
    if preset is None:
        return None
    own = environment.get(preset.variable, "")
    there = own_flags(environment, preset.variable)
    missing = [f"--{name}={text}" for name, text in preset.texts.items() if name not in there]
    if missing:
        environment[preset.variable] = " ".join([*missing, own]).strip()
    return preset


def describe_flags(environment: Mapping[str, str]) -> str:
    """One line for the banner: the active preset, and other flags."""
    preset, parts = preset_here(environment), []
    if preset is not None:
        there = own_flags(environment, preset.variable)
        taken = [name for name, text in preset.texts.items() if there.get(name) == text]
        changed = [f"{name}={there[name]}" for name in preset.flags if name in there and name not in taken]
        if taken:
            parts.append(f"preset {preset.name} ({len(taken)} in {preset.variable})")
        if changed:
            parts.append("set by you: " + ", ".join(changed))
    for variable in (GPU_VARIABLE, TPU_VARIABLE):
        known = preset.flags if preset is not None and preset.variable == variable else {}
        more = [f"{name}={value}" for name, value in own_flags(environment, variable).items() if name not in known]
        if more:
            parts.append(f"{variable} has " + ", ".join(more))
    return "; ".join(parts) or "XLA's own defaults"
