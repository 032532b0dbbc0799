"""XLA's flags: to the right variable, the user's own last; every one a flag of the jaxlib and libtpu installed."""

import os
import subprocess
import sys

import pytest

from ctllm_jax.cluster import hardware, xla_flags
from ctllm_jax.cluster.chips import CHIPS
from ctllm_jax.cluster.xla_flags import GPU_VARIABLE, TPU_VARIABLE, compiler_options, flags_for, preset_for
from tests.cluster.test_hardware import H100, make_bus

V5E = ("0x1ae0", "0x0063", "0x120000")
CHIP_NAMES = sorted({chip.name for chip in CHIPS.values()})
PRESETS = [preset for chip in CHIP_NAMES if (preset := preset_for(chip))]
ASK = {GPU_VARIABLE: "from jaxlib import xla_client; xla_client.make_cpu_client()",
       TPU_VARIABLE: "from jax.experimental import topologies\n"
                     "topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')"}


def words(preset):
    return [f"--{name}={text}" for name, text in preset.texts.items()]


def taken(variable, words):
    """Whether the compiler of a variable takes these flags, in a process of its own; what it said."""
    kept = {name: value for name, value in os.environ.items() if name not in ASK}
    done = subprocess.run([sys.executable, "-c", ASK[variable]], capture_output=True, text=True, check=False,
                          env={**kept, "JAX_PLATFORMS": "cpu", variable: " ".join(words)})
    return done.returncode == 0 and "ERROR:" not in done.stderr, done.stderr


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with these devices on its bus."""
    def make(*devices):
        bus = make_bus(tmp_path / f"bus{len(list(tmp_path.iterdir()))}", devices)
        monkeypatch.setattr(xla_flags, "find_accelerators",
                            lambda environment: hardware.find_accelerators(environment, bus=bus))

    return make


def test_there_are_presets():
    assert {preset.variable for preset in PRESETS} == {GPU_VARIABLE, TPU_VARIABLE}
    assert flags_for("h100") and flags_for("h100") == flags_for("h200") and flags_for("b200") == {}


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset.variable == GPU_VARIABLE],
                         ids=lambda preset: preset.name)
def test_jaxlib_takes_every_gpu_flag(preset):
    good, said = taken(GPU_VARIABLE, words(preset))
    assert good, said


@pytest.mark.aot
@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset.variable == TPU_VARIABLE],
                         ids=lambda preset: preset.name)
def test_libtpu_takes_every_tpu_flag(preset):
    good, said = taken(TPU_VARIABLE, words(preset))
    assert good, said


@pytest.mark.parametrize(("variable", "flag"), [
    (GPU_VARIABLE, "--xla_gpu_enable_async_all_gather=true"), (GPU_VARIABLE, "--xla_tpu_scoped_vmem_limit_kib=65536"),
    pytest.param(TPU_VARIABLE, "--xla_tpu_that_never_was=true", marks=pytest.mark.aot)])
def test_a_flag_that_does_not_exist_is_noticed(variable, flag):
    good, said = taken(variable, [flag])
    assert not good and flag.lstrip("-").partition("=")[0] in said


@pytest.mark.aot
def test_a_single_compilation_takes_them_too():
    """As `compile` gives them; and there an unknown one is refused."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    lowered = jax.jit(lambda x: x + 1).lower(x)
    lowered.compile(compiler_options=flags_for("v5e"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_tpu_that_never_was"):
        lowered.compile(compiler_options={"xla_tpu_that_never_was": True})


def test_gpu_flags_are_options_of_one_compilation():
    import jax

    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    lowered.compile(compiler_options=flags_for("h100"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_that_never_was"):
        lowered.compile(compiler_options={"xla_gpu_that_never_was": True})


def test_a_preset_stands_before_what_the_user_has_set(machine):
    machine(*[H100] * 8)
    name, value = next(iter(flags_for("h100").items()))
    own = f"--xla_dump_to=/tmp/x --{name}=7"
    environment = {GPU_VARIABLE: own}
    assert xla_flags.set_flags(environment, "auto").name == "h100"
    assert environment[GPU_VARIABLE].endswith(own)
    merged = xla_flags.own_flags(environment, GPU_VARIABLE)
    assert merged == {**preset_for("h100").texts, name: "7", "xla_dump_to": "/tmp/x"}
    assert TPU_VARIABLE not in environment
    again = dict(environment)
    xla_flags.set_flags(again, "auto")
    assert again == environment, "twice is as once"
    shown = xla_flags.describe_flags(environment)
    assert "preset h100" in shown and f"set by you: {name}=7" in shown and "xla_dump_to=/tmp/x" in shown
    assert compiler_options("h100", environment).keys() == set() and str(value) not in shown


def test_tpu_flags_go_where_libtpu_reads_them(machine):
    machine(*[V5E] * 4)
    environment = {GPU_VARIABLE: "--xla_dump_to=/tmp/x"}
    preset = xla_flags.set_flags(environment, "auto")
    assert environment[GPU_VARIABLE] == "--xla_dump_to=/tmp/x"
    assert xla_flags.own_flags(environment, TPU_VARIABLE) == preset.texts


@pytest.mark.parametrize(("devices", "setting", "more"), [
    ([], "auto", {}), ([H100], "none", {}), ([H100], "auto", {"JAX_PLATFORMS": "cpu"})])
def test_nothing_is_set_where_nothing_helps(devices, setting, more, machine):
    machine(*devices)
    environment = dict(more)
    assert xla_flags.set_flags(environment, setting) is None and environment == more
    assert xla_flags.describe_flags(environment) == "XLA's own defaults"


def test_what_a_user_sets_for_a_compilation_wins():
    name = next(iter(flags_for("h100")))
    assert name not in compiler_options("h100", {GPU_VARIABLE: f"--{name}=1"})
    assert compiler_options("h100", {}) == flags_for("h100")


def test_the_command_sets_them_before_jax_is_imported(tmp_path):
    """`pretrain` in a process of its own, on a bus with an H100: seen from where jax is first imported."""
    bus = make_bus(tmp_path / "bus", [H100])
    program = f"""
import os, pathlib, sys
from ctllm_jax.cluster import hardware
hardware.find_accelerators.__kwdefaults__["bus"] = pathlib.Path({str(bus)!r})

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "jax":
            print("FLAGS", os.environ.get("XLA_FLAGS"), "CACHE", os.environ.get("JAX_COMPILATION_CACHE_DIR"),
                  flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
from ctllm_jax.cli import main
main(["pretrain", "debug/pretrain", "run.dir={tmp_path}/runs/one"])
"""
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False,
                          env={**kept, "XLA_FLAGS": "--xla_dump_to=/tmp/own"})
    line = done.stdout.splitlines()[-1]
    assert line.startswith("FLAGS --xla_gpu_") and f"CACHE {tmp_path}/runs/.compilation_cache" in line, done.stderr
    assert line.partition(" CACHE")[0].endswith(" --xla_dump_to=/tmp/own")
