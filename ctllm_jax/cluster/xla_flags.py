"""XLA's flags per chip, put into the environment before jax is imported; the user's own stand last, and win. No jax.

TPU's compiler reads LIBTPU_INIT_ARGS, the GPU's XLA_FLAGS. In the wrong variable a flag aborts the process: jaxlib
knows no `xla_tpu_*`. `launch.py` calls `set_flags`; importing this changes nothing. tests/cluster/test_xla_flags.py
gives every flag to the installed jaxlib and libtpu, so that one which went away is noticed there and not on a slice.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from ctllm_jax.cluster.hardware import find_accelerators

GPU_VARIABLE, TPU_VARIABLE = "XLA_FLAGS", "LIBTPU_INIT_ARGS"
_TPU = {"v4": {}, "v5e": {}, "v5p": {}, "v6e": {}, "tpu7x": {}}
_SLICES = {}
_HOPPER = {
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
      flags: without dashes, as `compile(compiler_options=)` takes them too.
    """

    name: str
    variable: str
    flags: dict[str, str]

    @property
    def words(self) -> list[str]:
        """As the variable holds them."""
        return [f"--{name}={value}" for name, value in self.flags.items()]


def preset_for(chip: str, *, slices: int = 1) -> Preset | None:
    """The preset of a chip of `ctllm_jax.cluster.chips`, in so many slices or nodes; None where there is none."""
    if chip in _TPU:
        flags = {**_TPU[chip], **(_SLICES if slices > 1 else {})}
        return Preset(chip + (", several slices" if slices > 1 else ""), TPU_VARIABLE, flags)
    return Preset(chip, GPU_VARIABLE, dict(_HOPPER)) if chip in ("h100", "h200") else None


def flags_for(chip: str, *, slices: int = 1) -> dict[str, str]:
    """Flag -> value for a chip; empty where nothing is known to help. A pure function."""
    preset = preset_for(chip, slices=slices)
    return {} if preset is None else dict(preset.flags)


def own_flags(environment: Mapping[str, str], variable: str) -> dict[str, str]:
    """What a variable holds: flag -> value, the last of a name; a flag without one is "true"."""
    try:
        words = shlex.split(environment.get(variable, ""))
    except ValueError:
        words = environment.get(variable, "").split()
    pairs = (word.lstrip("-").partition("=") for word in words if word.startswith("--"))
    return {name: value if sign else "true" for name, sign, value in pairs}


def compiler_options(chip: str, environment: Mapping[str, str], *, slices: int = 1) -> dict[str, str]:
    """The preset for one compilation (`compile(compiler_options=)`), less what the user's environment decides."""
    preset = preset_for(chip, slices=slices)
    if preset is None:
        return {}
    own = own_flags(environment, preset.variable)
    return {name: value for name, value in preset.flags.items() if name not in own}


def preset_here(environment: Mapping[str, str]) -> Preset | None:
    """The preset of the chips of this machine."""
    here = find_accelerators(environment)
    slices = environment.get("MEGASCALE_NUM_SLICES", "1")
    return None if here is None else preset_for(here.chip, slices=int(slices) if slices.isdigit() else 1)


def set_flags(environment: MutableMapping[str, str], setting: str) -> Preset | None:
    """Put the preset of this machine's chips before the user's own flags; `setting` is `compute.xla_flags`.

    Twice is as once, so that a process may start another.
    """
    preset = preset_here(environment) if setting == "auto" else None
    if preset is None:
        return None
    own = environment.get(preset.variable, "")
    missing = [word for word in preset.words if word.partition("=")[0][2:] not in own_flags(environment,
                                                                                           preset.variable)]
    if missing:
        environment[preset.variable] = " ".join([*missing, own]).strip()
    return preset


def describe_flags(environment: Mapping[str, str]) -> str:
    """One line for the banner: the preset that is in force, and what else is set."""
    preset, parts = preset_here(environment), []
    if preset is not None:
        there = own_flags(environment, preset.variable)
        taken = [name for name, value in preset.flags.items() if there.get(name) == value]
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
