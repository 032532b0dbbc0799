"""The plan's arithmetic, against what a run really takes."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctllm_jax import sharding
from ctllm_jax.cluster.chips import CHIPS
from ctllm_jax.config.load import config_root, load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.config.sft import SFTConfig
from ctllm_jax.model.lora import count_adapters
from ctllm_jax.model.parameters import count_parameters
from ctllm_jax.preflight import plan
from ctllm_jax.training.checkpoints.checkpointer import Checkpointer
from ctllm_jax.training.run import plan_step
from ctllm_jax.training.state import init_state

FIXED = 64 * 1024
"""Bytes of a checkpoint that are names and shapes, whatever the model's size."""


def make_config(*overrides, target="debug/pretrain"):
    return load(PretrainConfig, target=target, overrides=overrides)


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_bytes_of_a_checkpoint_are_those_on_disk(tmp_path, with_optimizer):
    """Trained weights hardly compress: normal numbers stand for them here."""
    config = make_config("checkpoint.every=1", "checkpoint.milestones=[5e-7]",
                         f"checkpoint.milestone_optimizer={with_optimizer}")
    mesh = sharding.make_mesh(config.mesh.model_dump())
    state = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(x.dtype),
                         plan_step(config, mesh).abstract_state)
    state = jax.tree.map(jnp.asarray, state)
    expected = plan.checkpoint_bytes(config)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == pytest.approx(expected["resumable"], abs=64)
    checkpointer = Checkpointer(tmp_path, config.checkpoint, tokens_per_step=config.batch.tokens, meta={})
    checkpointer.save(state, step=1)
    checkpointer.close()
    for kind, folder in (("resumable", "checkpoints"), ("milestone", "milestones")):
        real = size_of(tmp_path / folder / "1")
        assert 0.85 * expected[kind] <= real <= expected[kind] + FIXED, kind


@pytest.mark.parametrize("overrides", [
    ("steps=12", "checkpoint.every=2", "checkpoint.keep_last=2"), ("steps=12", "checkpoint.every=50"),
    ("steps=13", "checkpoint.every=4", "checkpoint.keep_last=9"),
    ("steps=12", "checkpoint.every=2", "checkpoint.keep_last=2", "checkpoint.keep_every=4"),
    ("steps=12", "checkpoint.every=3", "checkpoint.keep_last=1", "checkpoint.milestones=[1e-6,3.5e-6,1.0]")])
def test_as_many_are_kept_as_a_run_leaves(tmp_path, overrides):
    """And never more at a time, the one that is being written and what is about to go included."""
    config = make_config(*overrides)
    expected = plan.checkpoints_kept(config)
    checkpointer = Checkpointer(tmp_path, config.checkpoint, tokens_per_step=config.batch.tokens, meta={})
    state = init_state({"w": jnp.zeros(4)}, optax.adam(1e-3))
    most = 0
    for step in range(1, config.steps + 1):
        if checkpointer.is_due(step, last=step == config.steps):
            checkpointer.save(state, step=step, last=step == config.steps)
            most = max(most, on_disk(tmp_path / "checkpoints"))
    checkpointer.close()
    left = on_disk(tmp_path / "checkpoints")
    saved = -(-config.steps // config.checkpoint.every)
    assert most <= expected["resumable"] and left == expected["resumable"] - (saved > left)
    assert on_disk(tmp_path / "milestones") == expected["milestone"]


def on_disk(folder):
    """Steps in a folder: whole, half written, or in the trash."""
    if not folder.exists():
        return 0
    trash = list((folder / "trash").iterdir()) if (folder / "trash").exists() else []
    return len([path for path in folder.iterdir() if path.name != "trash"]) + len(trash)


@pytest.mark.parametrize("billions", [0.067, 0.134, 1.07])
def test_a_milestone_at_the_last_token_counts(billions):
    config = make_config("batch.tokens=1_000_000", "batch.sequence_length=50", f"steps={round(billions * 1000)}",
                         f"checkpoint.milestones=[{billions}]")
    assert plan.checkpoints_kept(config)["milestone"] == 1


def test_hours_of_the_papers_run():
    """598,300 steps of 2,097,152 tokens, each 6·N_matmul + 6·L·N·H·S FLOPs, at 40 % of 989.4 TFLOP/s."""
    config = make_config(target="ct_llm_2b/pretrain")
    matmul = 32 * (4 * 2048 * 2048 + 3 * 2048 * 5504) + 2048 * 125_824
    flops = 6 * matmul + 6 * 32 * 2048 * 4096
    hours = 598_300 * 2_097_152 * flops / (0.4 * 989.4e12) / 3600
    assert plan.hours(config, CHIPS["NVIDIA H100"], 1) == pytest.approx(hours, rel=1e-6)
    assert plan.hours(config, CHIPS["NVIDIA H100"], 8) == pytest.approx(hours / 8, rel=1e-6)
    assert plan.hours(config, CHIPS["TPU v5p"], 1) == pytest.approx(hours * 989.4 / 459, rel=1e-6)


STATED = re.compile(r"([\d,.]+) (?:H100 hours at 40 % MFU|hours on one H100)")
STATING = [path for path in sorted(config_root().rglob("*.yaml")) if STATED.search(path.read_text())]


@pytest.mark.parametrize("path", STATING, ids=lambda path: str(path.relative_to(config_root())))
def test_the_hours_that_a_config_states(path):
    stated = float(STATED.search(path.read_text())[1].replace(",", ""))
    assert plan.hours(make_config(target=path), CHIPS["NVIDIA H100"], 1) == pytest.approx(stated, rel=0.03)


def test_some_configs_state_their_hours():
    assert len(STATING) >= 4


@pytest.mark.parametrize(("mesh", "devices"), [
    (("mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2"), 8), (("mesh.data=8",), 8), (("mesh.data=1", "mesh.fsdp=-1"), 8),
    (("mesh.data=2", "mesh.fsdp=2"), 4)])
def test_parameters_and_moments_of_a_device_are_those_of_the_state(mesh, devices):
    """Norms are whole on every device, which the plan leaves out: 160 of 41,120 numbers."""
    config = make_config(*mesh)
    made = sharding.make_mesh(config.mesh.model_dump(), jax.devices()[:devices])
    state = plan_step(config, made).abstract_state

    def on_a_device(tree):
        return sum(4 * np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=int) for leaf in jax.tree.leaves(tree))

    expected = plan.memory_bytes(config, devices=devices, rows=1)
    assert expected["parameters"] == expected["gradients"] == pytest.approx(on_a_device(state.params), abs=4 * 160)
    assert expected["optimizer"] == pytest.approx(on_a_device(state.opt_state), abs=8 * 160 + 8)


@pytest.mark.parametrize(("devices", "rows", "gib"), [(256, 4, 4.32), (64, 4, 5.01), (64, 4, 5.39), (8, 2, 6.30)])
def test_memory_is_above_what_compilers_say_and_not_by_much(devices, rows, gib):
    """Peaks of the 2B step with a tied head, compiled ahead of time for v5e 16x16, v5p 4x4x4, tpu7x 4x4x4, 8 H100."""
    config = make_config("model.tie_embeddings=true", target="ct_llm_2b/pretrain")
    estimate = sum(plan.memory_bytes(config, devices=devices, rows=rows).values()) / 2**30
    assert gib < estimate < 2 * gib


@pytest.mark.parametrize(("remat", "tensor", "mib"), [
    ("none", 1, 970.4), ("none", 2, 705.8), ("none", 4, 588.0), ("block", 1, 177.5)])
def test_memory_with_a_tensor_axis_is_above_what_the_compiler_says_and_not_by_much(remat, tensor, mib):
    """Temporaries of a step of four rows, compiled ahead of time for v5e 2x2 (jax 0.10.2, gradient_rings off)."""
    config = make_config(
        f"mesh.tensor={tensor}", "mesh.data=1", "mesh.fsdp=-1", f"compute.remat={remat}", "compute.dtype=bfloat16",
        "model.hidden_size=512", "model.num_layers=8", "model.num_kv_heads=4", "model.head_dim=128",
        "model.ffn_size=1536", "model.vocab_size=2048", "model.context_length=1024", "batch.sequence_length=1024",
        f"batch.tokens={16384 // tensor}", "compute.loss_chunk=1024")
    found = plan.memory_bytes(config, devices=4, rows=4)
    assert mib < (found["gradients"] + found["activations"] + found["logits"]) / 2**20 < 1.15 * mib


@pytest.mark.parametrize("remat", ["none", "ffn", "attention", "block"])
def test_heads_and_ffn_are_split_over_the_tensor_axis_and_the_residual_stream_is_not(remat):
    """By hand, for one row of S = 4,096 tokens in bf16 through 32 layers; the last layer's parts are there in full."""
    shapes = {1: (2048, 2 * 2048 + 2 * 2048, 5504), 4: (2048, 2 * 512 + 2 * 512, 1376)}
    for tensor, (stream, heads, ffn) in shapes.items():
        config = make_config("mesh.data=1", "mesh.fsdp=2", f"mesh.tensor={tensor}", f"compute.remat={remat}",
                             target="ct_llm_2b/pretrain")
        whole = 12 * stream + 2 * heads + 3 * ffn
        kept = {"none": whole, "ffn": 4 * stream + 2 * heads, "attention": stream + heads, "block": stream}[remat]
        found = plan.memory_bytes(config, devices=2 * tensor, rows=1)
        assert found["activations"] == 2 * 4096 * (32 * kept + whole)


def test_devices_that_share_rows_compute_the_rows_of_all_of_them(tmp_path):
    """Eight rows over 8 devices are one each; with mesh.tensor=4 four devices compute four rows together."""
    alone, shared = (warnings_of(make_config(*mesh), tmp_path, devices=8)[0]["memory on each of 8"] for mesh in
                     (("mesh.data=8",), ("mesh.data=2", "mesh.tensor=4")))
    sizes = [sum(plan.memory_bytes(make_config(*mesh), devices=8, rows=rows).values()) for mesh, rows in
             ((("mesh.data=8",), 1), (("mesh.data=2", "mesh.tensor=4"), 4))]
    for size, text in zip(sizes, (alone, shared), strict=True):
        assert f"about {size / 2**20:,.1f} MiB" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_under_lora_only_adapters_have_gradients_and_moments(dtype):
    """What is frozen is in the matmuls' dtype but for norms: 160 numbers; adapters are split but for their rank."""
    config = make_config("init=base", "lora.rank=4", f"compute.dtype={dtype}", "mesh.data=1", "mesh.fsdp=2")
    made = sharding.make_mesh(config.mesh.model_dump(), jax.devices()[:2])
    planned, expected = plan_step(config, made), plan.memory_bytes(config, devices=2, rows=1)
    frozen = [np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=int) * leaf.dtype.itemsize
              for leaf in jax.tree.leaves(planned.abstract_frozen)]
    assert expected["frozen parameters"] == pytest.approx(sum(frozen), abs=4 * 160)
    trained = sum(leaf.size for leaf in jax.tree.leaves(planned.abstract_state.params))
    assert plan.count_trained(config) == trained and plan.checkpoint_bytes(config)["resumable"] == 12 * trained
    assert expected["gradients"] == 2 * trained and expected["optimizer"] == 4 * trained


def test_adapters_of_the_2b_model_fit_where_it_does_not(repository):
    """6.46 GiB: the peak of the compiled step on one v5p, with rank 16 and a row of 2,048 tokens."""
    shape = ("init=base", "batch.sequence_length=2048", "batch.tokens=262144")
    full, adapted = (sum(plan.memory_bytes(make_config(*shape, *more, target="ct_llm_2b/pretrain"), devices=1,
                                           rows=1).values()) / 2**30 for more in ((), ("lora.rank=16",)))
    assert 6.46 < adapted < 1.1 * 6.46 and full > 5 * adapted
    table = (repository / "docs" / "lora.md").read_text()
    for more in ("lora=null", "lora.rank=8", "lora.rank=16", "lora.rank=64"):
        config = make_config(*shape, more, target="ct_llm_2b/pretrain")
        sizes = plan.memory_bytes(config, devices=1, rows=1)
        checkpoint = plan.checkpoint_bytes(config)["resumable"] / 2**30
        assert re.search(rf"\| {plan.count_trained(config):,} \|.*\| {sum(sizes.values()) / 2**30:.1f} GiB \|"
                         rf" {checkpoint:.2f} GiB \|", table), more


@pytest.mark.parametrize("family", ["quickstart", "ct_llm_2b"])
def test_what_the_configs_of_adapters_state(family):
    head = (config_root() / family / "sft_lora.yaml").read_text()
    tuning, base = load(SFTConfig, target=f"{family}/sft_lora"), make_config(target=f"{family}/pretrain")
    stated = re.search(r"([\d,]+) parameters are trained beside ([\d,]+)\s", head).groups()
    assert [int(number.replace(",", "")) for number in stated] == [count_adapters(base.model, tuning.lora),
                                                                  count_parameters(base.model)]


def test_stronger_remat_and_more_devices_take_less():
    def total(*overrides, devices=8):
        config = make_config(*overrides, target="small/1b")
        return sum(plan.memory_bytes(config, devices=devices, rows=4).values())

    ladder = [total(f"compute.remat={rung}") for rung in ("block", "attention", "ffn", "none")]
    assert ladder == sorted(ladder) and ladder[0] < ladder[-1] / 2
    assert total(devices=64) < total(devices=8) < total(devices=1)
    assert total("compute.dtype=bfloat16") < total("compute.dtype=float32")


def warnings_of(config, directory, **options):
    rows, warnings = plan.describe(config, directory=directory, epochs=options.pop("epochs", None),
                                   tokens_per_source=options.pop("tokens_per_source", None), **options)
    return dict(rows), warnings


def test_what_is_told(tmp_path):
    rows, warnings = warnings_of(make_config(), tmp_path / "not" / "yet", tokens_per_source={"zh": 5020, "en": 100},
                                 epochs={"zh": 2.0, "en": 9.5}, device_kind="TPU v5 lite", devices=4)
    assert rows["steps"] == "10 of 512 tokens (8 rows of 64)" and rows["parameters"] == "41,120"
    assert rows["source zh"] == "5,020 tokens, 2.00 epochs" and "memory on each of 4" in rows
    assert "2 resumable x 0.5 MiB = 0.9 MiB" in rows["checkpoints"] and "4 x v5e" in rows["hours at 40% MFU"]
    assert len(warnings) == 1 and warnings[0].startswith("source en is seen 9.5 times")
    assert not (tmp_path / "not").exists()


def test_what_is_told_of_adapters(tmp_path):
    rows, _ = warnings_of(make_config("init=base", "lora.rank=4"), tmp_path)
    assert rows["parameters"] == "41,120 frozen, 4,864 trained (11.83%)"
    assert "frozen parameters 0.2 MiB" in rows["memory on each of 1"]


def test_no_room_on_the_disk_or_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10 * 2**30))
    _, warnings = warnings_of(make_config(target="ct_llm_2b/pretrain"), tmp_path, device_kind="TPU v5 lite", devices=1)
    memory, disk = warnings
    assert "a v5e has 16 GiB" in memory and "compute.remat" in memory
    # Three kept, one being written, and nineteen milestones of 7.95 GiB.
    assert "checkpoints need 246.50 GiB" in disk and f"{tmp_path} has 10.00 GiB free" in disk


def test_without_a_known_chip_the_usual_offers(tmp_path):
    rows, _ = warnings_of(make_config(), tmp_path, device_kind="cpu", devices=8)
    assert "H100: " in rows["hours at 40% MFU"] and "v5p-64" in rows["hours at 40% MFU"]
    assert "a run shows its ETA" in rows["hours here"]
