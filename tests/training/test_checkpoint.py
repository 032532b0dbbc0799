"""What is kept, what is found again, and what is said when there is no room or the values do not fit."""

import errno
import json
import os
import shutil
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctllm_jax import sharding
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import CheckpointConfig, PretrainConfig
from ctllm_jax.training.checkpoints.checkpoint import find_checkpoint, list_checkpoints, load_params, read_model_config
from ctllm_jax.training.checkpoints.checkpointer import Checkpointer
from ctllm_jax.training.checkpoints.fingerprint import compare_fingerprints, make_fingerprint
from ctllm_jax.training.pretrain import open_stage
from ctllm_jax.training.run import StepPlan, prepare_run
from ctllm_jax.training.state import State, init_state

TOKENS = 1000
OPTIMIZER = optax.adam(1e-3)


def make_state(step=0):
    """A small state, every number of it told by the step."""
    state = init_state({"w": jnp.arange(8, dtype=jnp.float32) + step}, OPTIMIZER)
    counter = jnp.int32(step)
    moments = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), state.opt_state)
    return State(state.params, moments, counter, counter, jnp.int32(7))


def abstract_state():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), jax.eval_shape(make_state))


@pytest.fixture
def make_checkpointer(tmp_path):
    """(keys of CheckpointConfig) -> a checkpointer in tmp_path, which looks like a run directory; closed at the end."""
    made = []

    def make(**config):
        (tmp_path / "config.yaml").touch()
        made.append(Checkpointer(tmp_path, CheckpointConfig(**config), tokens_per_step=TOKENS, meta={"eod_id": 3}))
        return made[-1]

    yield make
    for checkpointer in made:
        checkpointer.close()


def save(checkpointer, steps, *, last=None):
    for step in steps:
        if checkpointer.is_due(step, last=step == last):
            checkpointer.save(make_state(step), step=step, last=step == last)
    checkpointer.wait()


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.mark.parametrize(("config", "kept"), [
    ({"every": 2, "keep_last": 2}, [14, 15]), ({"every": 4, "keep_last": 9}, [4, 8, 12, 15]),
    ({"every": 2, "keep_last": 1, "keep_every": 6}, [6, 12, 15]), ({"every": 50, "keep_last": 3}, [15]),
    ({"every": 2, "keep_last": 1, "keep_every": 5}, [10, 15])])
def test_the_newest_and_each_multiple_are_kept(tmp_path, make_checkpointer, config, kept):
    save(make_checkpointer(**config), range(1, 16), last=15)
    assert steps_in(tmp_path / "checkpoints") == kept
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == kept
    assert not (tmp_path / "checkpoints/trash").exists()


def test_a_new_checkpointer_goes_on_with_the_same_rules(tmp_path, make_checkpointer):
    save(make_checkpointer(every=1, keep_last=3), [1, 2])
    save(make_checkpointer(every=1, keep_last=2), range(2, 5))
    assert steps_in(tmp_path / "checkpoints") == [3, 4]


def test_a_step_that_is_kept_is_not_written_again(tmp_path, make_checkpointer):
    checkpointer = make_checkpointer(every=1)
    save(checkpointer, [1])
    before = (tmp_path / "checkpoints/1").stat().st_mtime_ns
    save(checkpointer, [1], last=1)
    assert (tmp_path / "checkpoints/1").stat().st_mtime_ns == before


def test_what_is_restored_is_what_was_saved(make_checkpointer):
    checkpointer = make_checkpointer(every=1)
    save(checkpointer, [4, 5])
    assert checkpointer.latest() == 5
    for step in (4, 5):
        restored, wanted = checkpointer.restore(abstract_state(), step=step), make_state(step)
        assert jax.tree.structure(restored) == jax.tree.structure(wanted)
        for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    assert checkpointer.read_meta(4) == {"eod_id": 3, "format": 1, "step": 4, "tokens": 4000}


def test_a_checkpoint_of_a_newer_format_is_refused_by_name(tmp_path, make_checkpointer):
    checkpointer = make_checkpointer(every=1)
    save(checkpointer, [4])
    file = tmp_path / "checkpoints/4/meta/metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    message = f"{tmp_path}/checkpoints/4: format=2, this version reads format 1; use the version of ctllm_jax"
    for read in (lambda: checkpointer.read_meta(4), lambda: list_checkpoints(tmp_path),
                 lambda: find_checkpoint(str(tmp_path))):
        with pytest.raises(UserError, match=message):
            read()


@pytest.mark.parametrize("optimizer", [False, True])
def test_milestones_are_kept_for_good(tmp_path, make_checkpointer, optimizer):
    """At the first step that reaches each: 2,500 tokens at step 3, 6,000 at step 6, the end of the run at its end."""
    checkpointer = make_checkpointer(every=2, keep_last=1, milestones=[2.5e-6, 6e-6, 9e-6, 1],
                                     milestone_optimizer=optimizer)
    save(checkpointer, range(1, 10), last=9)
    assert steps_in(tmp_path / "milestones") == [3, 6, 9] and steps_in(tmp_path / "checkpoints") == [9]
    for step in (3, 6, 9):
        assert (tmp_path / "milestones" / str(step) / "trainer").exists() == optimizer
    kinds = [(checkpoint.step, checkpoint.kind) for checkpoint in list_checkpoints(tmp_path)]
    assert kinds == [(3, "milestone"), (6, "milestone"), (9, "milestone"), (9, "resumable")]
    _, kept = find_checkpoint(f"{tmp_path}@3")
    assert kept.meta["tokens"] == 3000
    np.testing.assert_array_equal(load_params(kept, abstract_state().params)["w"], make_state(3).params["w"])


def test_what_is_half_written_is_not_listed(tmp_path, make_checkpointer):
    checkpointer = make_checkpointer(every=1)
    save(checkpointer, [1, 2])
    shutil.copytree(tmp_path / "checkpoints/2", tmp_path / "checkpoints/3.orbax-checkpoint-tmp")
    (tmp_path / "checkpoints/4/params").mkdir(parents=True)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [1, 2]
    assert find_checkpoint(str(tmp_path))[1].step == 2


def test_a_model_by_its_name(tmp_path, make_checkpointer):
    save(make_checkpointer(every=2), range(1, 7))
    assert find_checkpoint(str(tmp_path)) == find_checkpoint(f"{tmp_path}@6")
    assert find_checkpoint(f"{tmp_path}@4")[1].step == 4
    with pytest.raises(UserError, match=r"no model .*@5: .* has no step 5; it has 2, 4, 6"):
        find_checkpoint(f"{tmp_path}@5")
    with pytest.raises(UserError, match=r"no model .*nowhere: .*nowhere is no directory"):
        find_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="checkpoints is no run directory: it has no config.yaml"):
        find_checkpoint(str(tmp_path / "checkpoints"))


def test_a_run_directory_whose_name_has_an_at(tmp_path, make_checkpointer):
    save(make_checkpointer(every=1), [1])
    shutil.copytree(tmp_path, tmp_path / "lr@high")
    assert find_checkpoint(str(tmp_path / "lr@high"))[0] == tmp_path / "lr@high"
    assert find_checkpoint(f"{tmp_path / 'lr@high'}@1")[0] == tmp_path / "lr@high"


def test_no_checkpoint_yet(tmp_path, make_checkpointer):
    make_checkpointer()
    assert list_checkpoints(tmp_path) == []
    with pytest.raises(UserError, match="has no checkpoint yet"):
        find_checkpoint(str(tmp_path))


def test_no_room_is_found_out_before_anything_is_written(tmp_path, make_checkpointer, monkeypatch):
    checkpointer = make_checkpointer(every=1)
    save(checkpointer, [1, 2])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 20))
    with pytest.raises(UserError, match=rf"no room for the checkpoint of step 3: it takes 0.0 MiB, and {tmp_path} has"
                                        " 0.0 MiB free; make room there and give the same command again: it goes on"
                                        " from step 2"):
        checkpointer.save(make_state(3), step=3)
    assert steps_in(tmp_path / "checkpoints") == [1, 2]
    assert np.array_equal(checkpointer.restore(abstract_state(), step=2).params["w"], make_state(2).params["w"])


def test_a_disk_that_fails_while_writing(tmp_path, make_checkpointer, monkeypatch):
    """The error comes up in another thread, and is told at the next save; what is half written does not stay."""
    checkpointer = make_checkpointer(every=1)
    save(checkpointer, [1])
    rename = os.rename

    def failing(source, target, **options):
        if "checkpoint-tmp" in str(source):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        rename(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        checkpointer.save(make_state(2), step=2)
        with pytest.raises(UserError, match=rf"a checkpoint could not be written below {tmp_path}: No space left on"
                                            " device; make room there .* goes on from step 1"):
            checkpointer.save(make_state(3), step=3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    again = make_checkpointer(every=1)
    save(again, [2, 3])
    assert steps_in(tmp_path / "checkpoints") == [1, 2, 3]


def make_config(directory, *overrides):
    return load(PretrainConfig, target="debug/pretrain", overrides=[f"run.dir={directory}", *overrides])


@contextmanager
def preparing():
    """(directory, overrides) -> a run, on so many devices, with its step not compiled: nothing here takes one."""
    make_mesh, runs = sharding.make_mesh, []

    def prepare(directory, *overrides, devices=8):
        patch.setattr(sharding, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:devices]))
        runs.append(prepare_run(open_stage(make_config(directory, *overrides)), directory=directory))
        return runs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepPlan, "compile", lambda plan: None)
        yield prepare
    for run in runs:
        run.checkpointer.close()


@pytest.fixture
def prepare():
    with preparing() as prepare:
        yield prepare


@pytest.fixture(scope="module")
def step_five(tmp_path_factory):
    """A run directory with step 5 in it, written on fsdp 4 x tensor 2; and that state, on the host."""
    directory = tmp_path_factory.mktemp("runs") / "kept"
    with preparing() as prepare:
        run = prepare(directory, "mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2")
        assert run.how == "scratch" and run.start == 0
        state = run.state.replace(opt_state=jax.tree.map(lambda x: x + 1, run.state.opt_state), step=jnp.int32(5),
                                  data_step=jnp.int32(5))
        run.checkpointer.save(state, step=5)
    return directory, jax.device_get(state)


@pytest.fixture
def kept_run(tmp_path, step_five):
    """A copy of it."""
    directory, state = step_five
    shutil.copytree(directory, tmp_path / "kept")
    return tmp_path / "kept", state


@pytest.mark.parametrize(("devices", "mesh"), [
    (8, ("mesh.data=4", "mesh.fsdp=2")), (8, ("mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2")),
    (2, ("mesh.data=1", "mesh.fsdp=2")), (1, ())])
def test_every_mesh_restores_the_same_bits(kept_run, prepare, devices, mesh):
    directory, saved = kept_run
    run = prepare(directory, *mesh, devices=devices)
    assert run.how == "resume" and run.start == 5
    assert jax.tree.structure(run.state) == jax.tree.structure(saved)
    for ours, theirs in zip(jax.tree.leaves(run.state), jax.tree.leaves(saved), strict=True):
        assert ours.dtype == theirs.dtype and np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
        assert len(ours.sharding.device_set) == devices


def test_init_takes_the_weights_alone(tmp_path, kept_run, prepare):
    directory, saved = kept_run
    run = prepare(tmp_path / "new", f"init={directory}@5", "optimizer.lr=1e-3", "seed=7")
    assert run.how == "init" and run.start == 0
    for ours, theirs in zip(jax.tree.leaves(run.state.params), jax.tree.leaves(saved.params), strict=True):
        assert np.array_equal(ours, theirs)
    fresh = [np.asarray(leaf) for leaf in jax.tree.leaves((run.state.opt_state, run.state.step, run.state.data_step))]
    assert all(not leaf.any() for leaf in fresh)
    # Once it has a checkpoint of its own, the same command resumes, and takes no weights again.
    run.checkpointer.save(run.state.replace(params=jax.tree.map(jnp.zeros_like, run.state.params)), step=5)
    run.checkpointer.wait()
    again = prepare(tmp_path / "new", f"init={directory}@5", "optimizer.lr=1e-3", "seed=7")
    assert again.how == "resume" and not np.asarray(again.state.params["embedding"]).any()


def test_init_from_another_shape_says_which(tmp_path, kept_run, prepare):
    directory, _ = kept_run
    with pytest.raises(UserError) as caught:
        prepare(tmp_path / "new", f"init={directory}", "model.ffn_size=64", "allow_mismatch=true")
    assert str(caught.value).splitlines() == [
        f"the weights of {directory / 'checkpoints/5'} are of another model:",
        "  blocks.down: [2, 96, 32] there, [2, 64, 32] here", "  blocks.gate: [2, 32, 96] there, [2, 32, 64] here",
        "  blocks.up: [2, 32, 96] there, [2, 32, 64] here"]


def test_a_contradiction_is_refused_with_every_difference(kept_run, prepare):
    directory, _ = kept_run
    with pytest.raises(UserError) as caught:
        prepare(directory, "seed=1", "optimizer.lr=2e-2", "batch.tokens=1024", "data.mask_eod=false", "steps=20")
    text = str(caught.value)
    for line in ("config.seed: 42 in the checkpoint, 1 now", "config.optimizer.lr: 0.01 in the checkpoint, 0.02 now",
                 "config.batch.tokens: 512 in the checkpoint, 1024 now",
                 "config.data.mask_eod: True in the checkpoint, False now",
                 "data.seed: 42 in the checkpoint, 1 now", "data.rows: 8 in the checkpoint, 16 now", "another run.dir"):
        assert line in text
    assert "steps" not in text and str(directory) in text


def test_more_steps_that_make_the_learning_rate_jump_are_told_before_the_run_begins(kept_run, prepare, caplog):
    directory, _ = kept_run
    run = prepare(directory, "steps=40")
    warnings = []
    run.checkpointer.listen(lambda text: None, record=warnings.append)
    # In the middle of the cosine over 10 steps, which is near the beginning of the one over 40.
    text, = [text for text in warnings if "the learning rate jumps" in text]
    assert text in caplog.text and "because steps=40 replaces steps=10" in text


def test_going_back_behind_the_newest_step_is_refused(kept_run, prepare):
    directory, _ = kept_run
    with pytest.raises(UserError, match=f"steps=4: {directory} is at step 5 already"):
        prepare(directory, "steps=4")


def fingerprint(*overrides):
    config = make_config("anywhere", *overrides)
    return json.loads(json.dumps(make_fingerprint(config, {"kind": "synthetic"})))


@pytest.mark.parametrize("override", [
    "steps=99", "run.dir=elsewhere", "checkpoint.every=1", "checkpoint.milestones=[1.0]", "mesh.fsdp=8",
    "log.every=7", "evaluation.every=3", "sample.prompts=[x]", "compute.remat=block", "compute.scan_layers=false",
    "compute.loss_chunk=64", "batch.rows_per_device=2", "data.prefetch=9", "data.sources.zh.path=moved",
    "init=somewhere"])
def test_what_a_resumed_run_may_change(tmp_path, override):
    assert fingerprint(override) == fingerprint()
    compare_fingerprints(fingerprint(), fingerprint(override), schema=PretrainConfig, run_dir=tmp_path)


@pytest.mark.parametrize("override", [
    "seed=1", "model.norm_eps=1e-6", "compute.dtype=bfloat16", "batch.tokens=1024", "loss.z_loss=1e-4",
    "optimizer.b2=0.99", "optimizer.schedule=wsd", "optimizer.warmup_steps=3", "data.isolate_documents=false",
    "optimizer.rules=[{pattern: head, lr_multiplier: 0.5}]"])
def test_what_it_may_not_change(tmp_path, override):
    with pytest.raises(UserError, match=f"config.{override.partition('=')[0]}: "):
        compare_fingerprints(fingerprint(), fingerprint(override), schema=PretrainConfig, run_dir=tmp_path)


def test_a_run_from_before_a_key_was_there_goes_on(tmp_path):
    before = fingerprint()
    del before["config"]["lora"]
    compare_fingerprints(before, fingerprint(), schema=PretrainConfig, run_dir=tmp_path)
    with pytest.raises(UserError, match="config.lora.rank: absent in the checkpoint, 8 now"):
        compare_fingerprints(before, fingerprint("init=base", "lora.rank=8"), schema=PretrainConfig, run_dir=tmp_path)


def test_a_run_from_before_a_key_with_a_default_existed_can_be_resumed_under_that_default_only(tmp_path):
    before = fingerprint()
    del before["config"]["data"]["mask_eod"], before["config"]["optimizer"], before["config"]["loss"]
    before["config"]["optimizer"] = {"lr": 1e-2, "warmup_steps": 2, "min_lr": 1e-3}
    compare_fingerprints(before, fingerprint(), schema=PretrainConfig, run_dir=tmp_path)
    with pytest.raises(UserError, match="config.data.mask_eod: True in the checkpoint, False now"):
        compare_fingerprints(before, fingerprint("data.mask_eod=false"), schema=PretrainConfig, run_dir=tmp_path)


def test_another_number_of_processors_is_told(kept_run, prepare, caplog):
    directory, _ = kept_run
    environment = json.loads((directory / "environment.json").read_text())
    prepare(directory)
    assert "processors" not in caplog.text
    (directory / "environment.json").write_text(json.dumps({**environment, "cpu_count": 999}))
    prepare(directory)
    assert "was started on 999 processors and continues on" in caplog.text


@pytest.mark.parametrize(("text", "message"), [
    ("model: {vocab_size: 250, num_experts: 8}", r"model\.num_experts=8.* use the version of ctllm_jax that wrote it"),
    ("model: 3", "model=3 must be a mapping"), ("steps: 3", "describes no model"), ("model: [", "describes no model")])
def test_a_model_that_this_version_cannot_read(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"config\.yaml.*{message}"):
        read_model_config(tmp_path)
