"""The train steps compiled by TPU's own compiler, for a slice that is not here: what it costs in memory."""

import re

import numpy as np
import pytest

from ctllm_jax import sharding
from ctllm_jax.cluster.topology import parse_topology
from ctllm_jax.cluster.xla_flags import compiler_options
from ctllm_jax.config.dpo import DPOConfig
from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.gathered import find_rings
from ctllm_jax.model.parameters import count_parameters
from ctllm_jax.preflight.aot import open_devices
from ctllm_jax.preflight.hlo import Program
from ctllm_jax.training.dpo import describe, make_loss_fn
from ctllm_jax.training.objective import Objective
from ctllm_jax.training.run import plan_step
from ctllm_jax.training.tuning import completed

pytestmark = pytest.mark.aot

ROWS, LENGTH, VOCAB, LAYERS, HIDDEN = 16, 512, 4096, 6, 256
OVERRIDES = [f"model.vocab_size={VOCAB}", f"model.hidden_size={HIDDEN}", f"model.num_layers={LAYERS}",
             "model.num_heads=2", "model.num_kv_heads=2", "model.head_dim=128", "model.ffn_size=768",
             f"model.context_length={LENGTH}",
             f"batch.sequence_length={LENGTH}", f"batch.tokens={ROWS * LENGTH}", "compute.dtype=bfloat16",
             "mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2", "compute.loss_chunk=512"]
# Where attention is not what is looked at: a kernel that is compiled 18 times takes minutes.
XLA = "compute.attention=xla"


@pytest.fixture(scope="module")
def devices():
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


def plan(devices, remat, *overrides, scan=True):
    config = load(PretrainConfig, target="debug/pretrain",
                  overrides=[*OVERRIDES, f"compute.remat={remat}", f"compute.scan_layers={scan}", *overrides])
    return plan_step(config, sharding.make_mesh(config.mesh.model_dump(), devices))


def temporaries(devices, remat, scan=True, options=None):
    """Bytes of temporaries on each chip."""
    return plan(devices, remat, XLA, scan=scan).compile(options).memory_analysis().temp_size_in_bytes


def test_memory_of_the_step_on_a_slice(devices):
    """Remat frees what it says, and no chip holds the logits of its rows."""
    none, block = temporaries(devices, "none"), temporaries(devices, "block")
    tokens = ROWS // 2 * LENGTH
    # Without remat each layer keeps at least its SwiGLU's two wide activations, split over tensor.
    assert none - block > tokens * 768 // 2 * 2 * 2 * (LAYERS - 1)
    logits = tokens * VOCAB // 2 * 4
    assert block < logits


def test_weights_are_gathered_and_gradients_go_around_the_ring(devices):
    """What is sent in a step whose parameters lie over all chips: no gradient is summed whole, none is waited for."""
    text = plan(devices, "block", XLA, "mesh.fsdp=4", "mesh.tensor=1").compile().as_text()
    sent = Program(text).collectives()
    around = [each for each in sent if each.kind == "collective-permute"]
    assert around and all(each.asynchronous for each in around)
    assert not [each for each in sent if each.kind in ("all-reduce", "reduce-scatter") and each.payload > 2**16]
    # Every weight's gradient in bf16, and the head's in f32 for each chunk: a quarter moves three times, in two halves.
    chunks = ROWS // 4 * LENGTH // 512
    expected = 3 / 4 * (2 * LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * 768) + 4 * HIDDEN * VOCAB * chunks)
    assert sum(each.payload * each.times for each in around) == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_above_16_chips_of_v5e_gradients_go_around_by_remote_copies():
    """Where XLA would wait for whole gradients: the first ring's hops have matmuls beside them, nothing is copied under
    way, and each send is followed by its own receive."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x8").devices
    rows = [f"batch.tokens={64 * LENGTH}", "mesh.fsdp=32", "mesh.tensor=1"]
    step = plan(devices, "block", XLA, *rows, "compute.gradient_rings=remote_copies")
    text = step.compile(compiler_options("v5e", {})).as_text()
    sent = Program(text).collectives()
    assert not [each for each in sent if each.kind in ("all-reduce", "reduce-scatter") and each.payload > 2**16]
    around = [each for each in sent if each.kind == "remote-copy"]
    expected = 31 / 32 * (2 * LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * 768) + 4 * HIDDEN * VOCAB * 2)
    assert sum(each.payload * each.times for each in around) == pytest.approx(expected, rel=0.01)
    assert 0.7 < sum(each.sent for each in around if each.asynchronous) / sum(each.sent for each in around) < 0.95

    lines = text.splitlines()  # of a scheduled module: in the order in which they run
    names = [line.split()[0] for line in lines if " = " in line]
    lines = [line for line in lines if " = " in line]
    sends = [place for place, name in enumerate(names) if name.startswith("%ring_send")]
    overlapped = 0
    for place in sends:
        parts = {name for name, line in zip(names, lines, strict=True) if f"get-tuple-element({names[place]})" in line}
        end = next(end for end in range(place, len(names)) if names[end].startswith("%ring_receive"))
        # Nothing is copied while it is on its way.
        operands = re.findall(r"%[\w.\-]+", lines[end].partition("custom-call(")[2].partition(")")[0])
        assert set(operands) == parts and len(parts) == 8
        overlapped += any("dot_general" in line for line in lines[place:end])
    assert overlapped == len(sends) // 2  # the second of two rings adds up what the first has computed


@pytest.mark.parametrize(("name", "rings"), [
    ("v5e:2x2", (4,)), ("v5e:4x4", (16,)), ("v5e:16x16", ()), ("v6e:16x16", (16, 16)), ("v4:2x2x4", (4, 2, 2)),
    ("v5p:4x4x4", (4, 4, 4)), ("tpu7x:4x4x4", (4, 4, 4, 2))])
def test_rings_of_a_slice(name, rings):
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, open_devices(parse_topology(name)))
    assert not find_rings(mesh, "fsdp", "off")
    found = find_rings(mesh, "fsdp").sizes
    assert sorted(found) == sorted(rings)
    if len(found) > 1:  # from one device to the next along a ring only one coordinate changes, by one
        coordinates = np.array([(*device.coords, device.core_on_chip) for device in mesh.devices.flat])
        grid = coordinates.reshape(*found, 4)
        for place in range(len(found)):
            assert set(np.abs(np.diff(grid, axis=place)).sum(-1).flat) == {1}


def test_a_dpo_step_holds_neither_a_second_model_nor_logits(devices):
    model = load(PretrainConfig, target="debug/pretrain", overrides=OVERRIDES).model
    same = [word for word in OVERRIDES if not word.startswith("model.")]
    config = completed(load(DPOConfig, target="quickstart/dpo", overrides=[
        *same, "compute.scan_layers=true", "compute.remat=block", "warmup_ratio=null"]),
        model=model.model_dump(), steps=10)
    mesh = sharding.make_mesh(config.mesh.model_dump(), devices)
    objective = Objective(lambda *args: make_loss_fn(*args[:2], mesh=args[2]), describe, num_segments=4)
    memory = plan_step(config, mesh, objective=objective).compile().memory_analysis()
    # Weights and two moments, split over all chips but for the norms.
    assert memory.argument_size_in_bytes < 1.05 * 3 * 4 * count_parameters(model) / 4
    assert memory.temp_size_in_bytes < ROWS // 2 * LENGTH * VOCAB // 2 * 4


def test_remat_of_unrolled_blocks_is_real_on_a_tpu(devices):
    """Where the CPU compiler merges what is computed twice, this one keeps it apart."""
    # What stays alive is decided early: the slow last passes of the compiler are left out.
    quickly = {"exec_time_optimization_effort": -1.0}
    none, attention, block = (temporaries(devices, remat, scan=False, options=quickly)
                              for remat in ("none", "attention", "block"))
    assert block < attention < none


def test_the_step_runs_the_pallas_kernels_on_each_device(devices):
    """`auto`, on a mesh that splits rows and heads; remat "attention" keeps what they give, so they run once."""
    for remat, forwards in (("block", 2), ("attention", 1)):
        step = plan(devices, remat)
        lowered = step.jitted.lower(step.abstract_state, step.abstract_batch, None)
        kernels = [lowered.as_text().count(f'kernel_name = "attention_{way}"') for way in ("forward", "backward")]
        assert kernels == [forwards, 1]
    lowered.compile()


@pytest.mark.slow
def test_the_2b_step_fits_a_slice_of_v5p():
    from jax.experimental import topologies

    config = load(PretrainConfig, target="ct_llm_2b/pretrain", overrides=["data=synthetic", "compute.attention=pallas"])
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4").devices
    compiled = plan_step(config, sharding.make_mesh(config.mesh.model_dump(), devices)).compile()
    assert compiled.memory_analysis().peak_memory_in_bytes < 16 * 2**30
