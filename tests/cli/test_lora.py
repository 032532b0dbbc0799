"""Adapters as a user trains, merges, moves and exports them: `sft`, `dpo` and `lora` from a run on text."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from ctllm_jax.huggingface.shards import read_tensors, write_tensors
from ctllm_jax.inference.model import load_model
from ctllm_jax.report.run import read_run
from ctllm_jax.training.checkpoints.checkpoint import list_checkpoints
from tests.cli.conftest import call
from tests.cli.test_dpo import write_pairs
from tests.cli.test_sft import write_dialogues
from tests.huggingface.folders import edit
from tests.runs import assert_same_bits, read_arrays

RANK, SCALE = 4, 2.0


@pytest.fixture(scope="module")
def command(text_run, tmp_path_factory):
    """Adapters for the run on text, on dialogues."""
    folder = tmp_path_factory.mktemp("lora")
    data = write_dialogues(folder / "zh.jsonl")
    return ["sft", "quickstart/sft", f"init={text_run.directory}", f"data.sources.zh={data}",
            f"run.dir={folder / 'run'}", f"lora.rank={RANK}", "lora.alpha=8", "optimizer.rules=[]", "batch.tokens=512",
            "batch.sequence_length=64", "data.epochs=2", "data.held_out=0.2", "optimizer.lr=1e-2", "evaluation.every=4",
            "evaluation.rows_per_device=2", "sample.every=4", "sample.max_tokens=6", "log.every=1",
            "checkpoint.every=2", "checkpoint.keep_last=9"]


@pytest.fixture(scope="module")
def tuned(command):
    """(its directory, what the command printed)."""
    printed = call(*command)
    assert printed.status == 0, printed.err
    return Path(command[4].partition("=")[2]), printed


def elsewhere(command, directory, *overrides):
    return [*(word for word in command if not word.startswith("run.dir=")), f"run.dir={directory}", *overrides]


def test_a_run_says_what_is_trained(tuned, text_run):
    directory, printed = tuned
    run = read_run(directory)
    trained = 2 * RANK * (4 * (32 + 32) - 2 * 16 + 3 * (32 + 96))
    assert run.state == "done" and run.start["trained_parameters"] == trained
    assert f"{trained:,} parameters trained" in printed.out and "rank 4, scale 8 / 4 = 2" in printed.out
    assert f"from the weights of {text_run.directory}, which stay as they are" in printed.out
    assert "blocks/query/a, blocks/query/b" in printed.out and "embedding" not in printed.out.split("optimizer")[1]
    losses = [record["loss"] for record in run.train]
    assert losses[-1] < losses[0] and run.evaluation[-1]["sources"]["zh"]["loss"] > 0 and run.sample
    assert f"next: python launch.py chat {directory}" in printed.out


def test_a_checkpoint_holds_adapters_alone(tuned, text_run):
    directory, _ = tuned
    kept = list_checkpoints(directory)[-1]
    arrays = read_arrays(directory, kept.step)
    trained = read_run(directory).start["trained_parameters"]
    assert sum(array.size for array in arrays.values() if array.ndim) == 3 * trained
    assert all(RANK in array.shape for array in arrays.values() if array.ndim)
    assert kept.meta["lora"]["rank"] == RANK and kept.meta["init"]["path"] == str(text_run.directory)
    assert kept.meta["init"]["step"] == 3 and len(kept.meta["init"]["run_sha256"]) == 64
    assert "resumable, adapters" in call("checkpoint", "ls", directory).out


def test_a_model_is_base_and_adapters_as_one(tuned, text_run):
    """By numpy, from what lies on the disk; and everything that is not adapted is the base's, bit for bit."""
    directory, _ = tuned
    model, base = load_model(str(directory)), load_model(str(text_run.directory))
    arrays = read_arrays(directory, model.step)
    assert model.template is not None and model.params.keys() == base.params.keys()
    for name, weight in model.params["blocks"].items():
        before = np.asarray(base.params["blocks"][name])
        if f"params['blocks']['{name}']['a']" in arrays:
            a, b = (arrays[f"params['blocks']['{name}']['{part}']"].astype(np.float64) for part in "ab")
            product = np.einsum("lir,lro->lio", a.reshape(2, -1, RANK), b.reshape(2, RANK, -1))
            assert np.abs(product).max() > 1e-3
            np.testing.assert_allclose(weight, before + SCALE * product.reshape(before.shape), atol=1e-6)
        else:
            assert np.array_equal(weight, before)
    assert np.array_equal(model.params["embedding"], base.params["embedding"])


def test_merged_is_the_same_model_without_its_base(tuned, tmp_path, monkeypatch):
    directory, _ = tuned
    printed = call("lora", "merge", directory, f"output={tmp_path / 'merged'}")
    assert printed.status == 0, printed.err
    assert f"next: python launch.py chat {tmp_path / 'merged'}" in printed.out
    ours, merged = load_model(str(directory)), load_model(str(tmp_path / "merged"))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours.params, merged.params))
    assert (merged.step, merged.stop_ids, merged.prefix_id) == (ours.step, ours.stop_ids, ours.prefix_id)
    assert merged.template.fingerprint() == ours.template.fingerprint()
    again = call("lora", "merge", directory, f"output={tmp_path / 'merged'}")
    assert again.status == 2 and "is there already" in again.err
    whole = call("lora", "merge", tmp_path / "merged", f"output={tmp_path / 'more'}")
    assert whole.status == 2 and "has no adapters: it is a whole model already" in whole.err


def test_the_whole_model_is_exported_merged(tuned, tmp_path):
    directory, _ = tuned
    printed = call("export-hf", directory, f"output={tmp_path / 'hf'}")
    assert printed.status == 0, printed.err
    ours, exported = load_model(str(directory)), load_model(str(tmp_path / "hf"))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours.params, exported.params))


@pytest.mark.parity
def test_adapters_are_exported_for_their_own_base_alone(tuned, text_run, tmp_path):
    directory, _ = tuned
    base = tmp_path / "base"
    assert call("export-hf", text_run.directory, f"output={base}", "dtype=bfloat16").status == 0
    words = ["export-hf", directory, "adapters=true"]
    own = call(*words, f"output={tmp_path / 'own'}", f"base_model={base}")
    assert own.status == 0 and f"for the base model {base}" in own.out, own.err
    as_run = call(*words, f"output={tmp_path / 'run'}")
    assert as_run.status == 0 and "note: PEFT cannot read a run directory" in as_run.out
    edit(base / "config.json", rope_theta=5e5)
    function = call(*words, f"output={tmp_path / 'a'}", f"base_model={base}")
    edit(base / "config.json", rope_theta=1e4)
    tensors = read_tensors(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2
    write_tensors(base / "model.safetensors", tensors)
    weights = call(*words, f"output={tmp_path / 'b'}", f"base_model={base}", "--dry-run")
    absent = call(*words, f"output={tmp_path / 'c'}", "base_model=some/base")
    for refused, message in ((function, "model.rope_theta: 500000.0 there, 10000.0 here"),
                             (weights, "weights: blocks/up differs"), (absent, "some/base is neither")):
        assert refused.status == 2 and message in refused.err and "allow_mismatch=true" in refused.err, refused.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "own", "run"]


@pytest.mark.parity
def test_an_export_is_what_the_disk_says(tuned, tmp_path):
    from safetensors.numpy import load_file

    directory, _ = tuned
    printed = call("export-hf", directory, f"output={tmp_path / 'peft'}", "adapters=true", "base_model=some/base",
                   "allow_mismatch=true")
    assert printed.status == 0 and "for the base model some/base; 28 tensors" in printed.out, printed.err
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    arrays = read_arrays(directory, load_model(str(directory)).step)
    assert len(tensors) == 2 * 7 * 2
    theirs = tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"]
    assert np.array_equal(theirs, arrays["params['blocks']['down']['a']"][1].T)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (RANK, 8, False)
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                             "down_proj"}


def test_the_same_command_goes_on_bit_for_bit(tuned, command, tmp_path):
    directory, _ = tuned
    step = read_run(directory).step
    shutil.copytree(directory, tmp_path / "run")
    for kept in list_checkpoints(tmp_path / "run")[1:]:
        shutil.rmtree(kept.path)
    resumed = call(*elsewhere(command, tmp_path / "run"))
    assert resumed.status == 0 and "resuming at step 2" in resumed.out, resumed.err
    assert_same_bits(read_arrays(tmp_path / "run", step), read_arrays(directory, step))
    changed = call(*elsewhere(command, tmp_path / "run", "lora.rank=8", "lora.targets=query"))
    assert changed.status == 2 and "config.lora.rank: 4 in the checkpoint, 8 now" in changed.err
    assert "config.lora.targets" in changed.err
    # Another init is not taken for the base, which is where it was; so is one that has gone on since.
    other = call(*elsewhere(command, tmp_path / "run", f"init={directory}"))
    assert other.status == 0, other.err
    assert_same_bits(read_arrays(tmp_path / "run", step), read_arrays(directory, step))


def test_a_dry_run_writes_nothing(tuned, tmp_path):
    for words, what in ((["lora", "merge"], "would merge the adapters"),
                        (["export-hf", "adapters=true"], "would export the adapters")):
        told = call(*words, tuned[0], f"output={tmp_path / 'out'}", "--dry-run")
        assert told.status == 0 and what in told.out and not (tmp_path / "out").exists()


def test_a_base_that_moved(tuned, text_run, tmp_path):
    directory, _ = tuned
    shutil.copytree(directory, tmp_path / "run")
    for kept in list_checkpoints(tmp_path / "run"):
        meta = kept.meta | {"init": kept.meta["init"] | {"path": "/gone/base", "relative": "../base"}}
        (kept.path / "meta" / "metadata").write_text(json.dumps(meta))
        (kept.path / "manifest.json").unlink()
    gone = call("chat", tmp_path / "run")
    assert gone.status == 2 and f"{tmp_path / 'run'} holds adapters of /gone/base@3" in gone.err
    assert "/gone/base is no directory" in gone.err and f"lora merge {tmp_path / 'run'} base=MODEL" in gone.err
    for base, message in ((f"{text_run.directory}@2", "is another model: it is at step 2"),
                          (tmp_path / "nowhere", "nowhere is no directory")):
        refused = call("lora", "merge", tmp_path / "run", f"output={tmp_path / 'out'}", f"base={base}")
        assert refused.status == 2 and message in refused.err and not (tmp_path / "out").exists()
    told = call("lora", "merge", tmp_path / "run", f"output={tmp_path / 'out'}", f"base={text_run.directory}")
    assert told.status == 0, told.err
    # Moved together with its adapters it is found.
    shutil.copytree(text_run.directory, tmp_path / "base")
    ours, theirs, told = (load_model(str(path)) for path in (tmp_path / "run", directory, tmp_path / "out"))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours.params, theirs.params))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours.params, told.params))
    # Another run in its place is not taken for it.
    for meta_file in (tmp_path / "base").glob("checkpoints/*/meta/metadata"):
        meta = json.loads(meta_file.read_text())
        meta["fingerprint"]["config"]["seed"] = 1
        meta_file.write_text(json.dumps(meta))
    other = call("generate", tmp_path / "run")
    assert other.status == 2 and "of a run with another config, data or beginning" in other.err


def test_preferences_on_top_of_adapters(tuned, tmp_path):
    """Adapters of adapters: the reference is the merged model, and the first step's rewards are none."""
    directory, _ = tuned
    pairs = write_pairs(tmp_path / "zh.jsonl", ["去公园散步。", "天气不错。"])
    printed = call("dpo", "quickstart/dpo", f"init={directory}", f"run.dir={tmp_path / 'run'}",
                   f"data.sources.zh.path={pairs}", "batch.tokens=1024", "batch.sequence_length=128", "steps=4",
                   "optimizer.lr=1e-2", "optimizer.schedule=constant", "warmup_ratio=null", "sample.every=0",
                   "log.every=1", "log.report=false", "lora.rank=2", "lora.targets=query|value", "mesh.data=1",
                   "mesh.fsdp=4", "mesh.tensor=2")
    assert printed.status == 0, printed.err
    train = read_run(tmp_path / "run").train
    assert train[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and train[-1]["rewards/margins"] > 0
    model, before = load_model(str(tmp_path / "run")), load_model(str(directory))
    moved = {name for name, weight in model.params["blocks"].items()
             if not np.array_equal(weight, before.params["blocks"][name])}
    assert moved == {"query", "value"}


@pytest.mark.parametrize(("overrides", "message"), [
    (["lora.targets=q_proj"], "lora.targets='q_proj' hits no parameter: what can be adapted is blocks/query"),
    (["lora.targets=head|query"], "hits head"),
    (["optimizer.rules=[{pattern: embedding}]"], "decides for no parameter"),
    (["lora.rank=0"], "must be >= 1")])
def test_what_does_not_fit_is_said_in_a_line(command, overrides, message, tmp_path):
    printed = call(*elsewhere(command, tmp_path / "run", *overrides))
    assert printed.status == 2 and message in printed.err and "Traceback" not in printed.err


def test_a_plan_tells_what_is_trained(command, tmp_path):
    printed = call(*elsewhere(command, tmp_path / "run", "--dry-run"))
    assert printed.status == 0 and "nothing was started" in printed.out and not list(tmp_path.iterdir())
    assert "49,312 frozen, 4,864 trained (9.86%)" in printed.out and "frozen parameters 0.2 MiB" in printed.out
