"""The train steps compiled by TPU's own compiler, for a slice that is not here: what it costs in memory."""

import pytest

from ctllm_jax import sharding
from ctllm_jax.config.dpo import DPOConfig
from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.model.parameters import count_parameters
from ctllm_jax.training.dpo import describe, make_loss_fn
from ctllm_jax.training.pretrain import Objective, plan_step
from ctllm_jax.training.sft import completed

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


def temporaries(devices, remat, scan=True):
    """Bytes of temporaries on each chip."""
    return plan(devices, remat, XLA, scan=scan).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_the_step_on_a_slice(devices):
    """Remat frees what it says, and no chip holds the logits of its rows."""
    none, block = temporaries(devices, "none"), temporaries(devices, "block")
    tokens = ROWS // 2 * LENGTH
    # Without remat each layer keeps at least its SwiGLU's two wide activations, split over tensor.
    assert none - block > tokens * 768 // 2 * 2 * 2 * (LAYERS - 1)
    logits = tokens * VOCAB // 2 * 4
    assert block < logits


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
    none, attention, block = (temporaries(devices, remat, scan=False) for remat in ("none", "attention", "block"))
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
