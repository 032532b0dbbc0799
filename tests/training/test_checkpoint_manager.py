"""A step's manifest is written when nothing else writes, and each process reads back only the files that it wrote;
milestones."""

import json
import shutil
import sys
import time
import zlib
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint._src.metadata import checkpoint as orbax_metadata

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pretrain import CheckpointConfig
from ctllm_jax.storage import open_path
from ctllm_jax.training.checkpoints import files
from ctllm_jax.training.checkpoints.checkpointer import Checkpointer
from ctllm_jax.training.state import init_state
from tests.object_store import BUCKET
from tests.runs import start
from tests.training.test_checkpoint import save, steps_in
from tests.training.test_checkpoint_damage import assert_restores, open_run
from tests.training.test_processes import free_port

LATE = 0.05
"""Seconds; before the manifest waited for the thread, any delay was too long."""


@pytest.fixture(params=["late", "torn"])
def delayed(request, monkeypatch):
    """Orbax's thread for `_CHECKPOINT_METADATA` comes late, or pauses after it has emptied the file."""
    update, write = orbax_metadata._NonBlockingMetadataStore._update_and_log, orbax_metadata._MetadataStoreImpl.write

    def late(store, *args, **options):
        time.sleep(LATE)
        return update(store, *args, **options)

    def torn(store, file_path, metadata):
        path = epath.Path(file_path)
        if path.exists():
            path.write_text("")
            time.sleep(LATE)
        return write(store, file_path, metadata)

    if request.param == "late":
        monkeypatch.setattr(orbax_metadata._NonBlockingMetadataStore, "_update_and_log", late)
    else:
        monkeypatch.setattr(orbax_metadata._MetadataStoreImpl, "write", torn)


def check_whole(run_dir, *steps):
    for folder in map(run_dir.joinpath, steps):
        assert files.find_damage(folder) == []
        parts = json.loads((folder / files.STEP_METADATA).read_text())
        assert {"params", "meta"} <= set(parts["item_handlers"]) and parts["commit_timestamp_nsecs"]
        assert json.loads((folder / files.MANIFEST).read_text())["files"][files.STEP_METADATA][0] > 0
    checkpointer = open_run(run_dir)
    assert checkpointer.latest() == int(folder.name)
    assert_restores(checkpointer, int(folder.name))
    checkpointer.close()
    assert not files.quarantined(run_dir)


def test_a_metadata_thread_that_is_late_on_a_disk(tmp_path, delayed):
    (tmp_path / "config.yaml").touch()
    checkpointer = open_run(tmp_path, milestones=[2e-6])
    save(checkpointer, [1, 2])
    checkpointer.close()
    check_whole(tmp_path, "checkpoints/1", "milestones/2", "checkpoints/2")
    step = tmp_path / "checkpoints/2"
    manifest = (step / files.MANIFEST).stat().st_mtime_ns
    later = [path.name for path in step.rglob("*") if path.is_file() and path.stat().st_mtime_ns > manifest]
    assert later == ["commit_success.txt"]


def test_a_metadata_thread_that_is_late_on_an_object_store(store, delayed, request):
    name = f"sealed-{request.node.callspec.id}"
    store.write(f"{name}/config.yaml", b"")
    run_dir = open_path(f"gs://{BUCKET}/{name}")
    checkpointer = open_run(run_dir)
    save(checkpointer, [1])
    checkpointer.close()
    written = [path.rpartition("/")[2] for method, path in store.requests
               if method in ("POST", "PUT") and "/checkpoints/1/" in path]
    assert set(written[written.index(files.MANIFEST):]) == {files.MANIFEST, "commit_success.txt"}
    check_whole(run_dir, "checkpoints/1")


def test_a_list_of_parts_that_is_not_written_fails_the_save(tmp_path, monkeypatch):
    """Whichever of Orbax's threads sees the error: a step without the list never gets its name."""
    monkeypatch.setattr(orbax_metadata._NonBlockingMetadataStore, "_update_and_log", lambda *_, **__: None)
    checkpointer = open_run(tmp_path)
    with pytest.raises(UserError, match="the list of the parts of the checkpoint was not written"):
        save(checkpointer, [1])
    assert not steps_in(tmp_path / "checkpoints")


@pytest.fixture(scope="module")
def three_kept(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kept")
    (directory / "config.yaml").touch()
    checkpointer = open_run(directory)
    save(checkpointer, [1, 2])
    checkpointer.close()
    return directory


@pytest.fixture
def run_dir(tmp_path, three_kept):
    """A copy of a run directory with steps 1 and 2."""
    return Path(shutil.copytree(three_kept, tmp_path / "run"))


def make_old(step: Path, *, written: bytes | None = None) -> None:
    """Rewrite a manifest as versions before 2026-12 did: of the list of parts a checksum of what was in it by then."""
    content = json.loads(written or (step / files.STEP_METADATA).read_bytes())
    content.pop("commit_timestamp_nsecs", None)
    manifest = json.loads((step / files.MANIFEST).read_text())
    crc = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    manifest["files"][files.STEP_METADATA] = [0, f"{crc:08x}"]
    manifest["own"] = f"{zlib.crc32(json.dumps(manifest['files'], sort_keys=True).encode()):08x}"
    (step / files.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("written", [None, b'{"init_timestamp_nsecs": 1}'])
def test_a_manifest_of_an_earlier_version(run_dir, written):
    """It may have the checksum of a list that Orbax changed afterwards; the step is whole all the same."""
    step = run_dir / "checkpoints/2"
    make_old(step, written=written)
    assert files.find_damage(step) == [] == files.find_damage(step, level="size")
    parts = (step / files.STEP_METADATA).read_text()
    for damaged, reason in (("", "is not what was written"), (parts[:99], "is not what was written"),
                            ("null", "is not what was written"), ('{"item_handlers": 1}', "is not what was written"),
                            (parts.replace('"trainer": "', '"other": "'), "does not list trainer")):
        (step / files.STEP_METADATA).write_text(damaged)
        assert files.find_damage(step) == [f"{files.STEP_METADATA}: {reason}"]


@pytest.mark.parametrize("damage", ["", '{"init_timestamp_nsecs": 1}'])
def test_the_same_file_damaged_in_every_step(run_dir, damage):
    """The last copies stay where they are, the message says what to look for, and its advice works."""
    for step in (1, 2):
        (run_dir / f"checkpoints/{step}" / files.STEP_METADATA).write_text(damage)
    for _ in range(2):
        checkpointer = open_run(run_dir)
        with pytest.raises(UserError) as caught:
            checkpointer.latest()
        checkpointer.close()
        first, *steps, why, advice = str(caught.value).splitlines()
        assert first == f"no checkpoint of {run_dir} is whole; none was moved or removed:"
        assert [line.partition(" has ")[0] for line in steps] == [
            f"  step {step}: {files.STEP_METADATA}:" for step in (2, 1)]
        assert why.startswith(f"Only {files.STEP_METADATA} is damaged, and in every step.")
        assert advice.startswith("checkpoint.verify=off resumes from step 2 without looking at its files.")
        assert steps_in(run_dir / "checkpoints") == [1, 2] and not (run_dir / "quarantine").exists()
    checkpointer = open_run(run_dir, verify="off")
    assert checkpointer.latest() == 2
    assert_restores(checkpointer, 2)
    checkpointer.close()


def count_measured(monkeypatch):
    measured, measure = [], files._measure

    def counting(path, **options):
        measured.append(path)
        return measure(path, **options)

    monkeypatch.setattr(files, "_measure", counting)
    return measured


@pytest.mark.parametrize("lost", [None, "cut off", "gone"])
def test_the_first_process_measures_what_no_other_has(run_dir, monkeypatch, lost):
    """Items have their temporary names when the processes measure; what one of them failed to hand over is read."""
    step = run_dir / "checkpoints/2"
    expected = json.loads((step / files.MANIFEST).read_text())
    (step / files.MANIFEST).unlink()
    # A second process, whose files are those of the first one under its name.
    for name, entry in list(expected["files"].items()):
        if "process_0" in name:
            copy = name.replace("process_0", "process_1")
            (step / copy).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(step / name, step / copy)
            expected["files"][copy] = entry
    for item in ("params", "trainer"):
        (step / item).rename(step / f"{item}.orbax-checkpoint-tmp")
    measured = count_measured(monkeypatch)
    files.write_sums(step, process=1)
    theirs = list(measured)
    assert theirs and all("process_1" in str(path) for path in theirs)
    for item in ("params", "trainer"):
        (step / f"{item}.orbax-checkpoint-tmp").rename(step / item)
    if lost == "cut off":
        (step / f"{files._SUMS}1").write_text('{"par')
    elif lost == "gone":
        (step / f"{files._SUMS}1").unlink()
    measured.clear()
    files.write_manifest(step)
    assert json.loads((step / files.MANIFEST).read_text())["files"] == expected["files"]
    assert any("process_1" in str(path) for path in measured) == (lost is not None)
    assert files.find_damage(step) == [] and not list(step.glob(f"{files._SUMS}*"))


def save_and_count(run_dir, coordinator, count, index):
    """One of several processes: save a state of 12 MiB twice, and print what this process read and wrote for it."""
    jax.distributed.initialize(coordinator, int(count), int(index))
    mesh, numbers = Mesh(np.array(jax.devices()), ("fsdp",)), 1 << 20
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())

    def make(key):
        state = init_state({"w": jax.random.normal(key, (numbers,))}, optax.adam(1e-3))
        noise = jax.tree.map(lambda x: state.params["w"] if x.shape == (numbers,) else x, state.opt_state)
        return state.replace(opt_state=noise)

    shardings = jax.tree.map(lambda x: split if x.shape == (numbers,) else whole,
                             jax.eval_shape(make, jax.random.key(0)))
    state = jax.jit(make, out_shardings=shardings)(jax.random.key(0))
    jax.block_until_ready(state)
    checkpointer = Checkpointer(Path(run_dir), CheckpointConfig(every=1), tokens_per_step=1, meta={"eod_id": 3})

    def counts():
        lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return {name: int(value) for name, value in lines}

    for step in (1, 2):
        before = counts()
        checkpointer.save(state, step=step)
        checkpointer.wait()
        after = counts()
        print(json.dumps({name: after[name] - before[name] for name in ("rchar", "wchar")}), flush=True)
    checkpointer.close()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux, which counts what a process reads")
def test_what_each_process_reads_and_writes_in_a_save(tmp_path):
    """By the kernel's counters: as much as it wrote itself, not the whole step in the first process."""
    coordinator = f"127.0.0.1:{free_port()}"
    both = [start(tmp_path, coordinator, 2, index, script=__file__) for index in range(2)]
    texts = [process.wait_for_text().stdout for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(texts)
    manifest = json.loads((tmp_path / "checkpoints/2" / files.MANIFEST).read_text())["files"]
    for index, text in enumerate(texts):
        own = sum(size for name, (size, _) in manifest.items() if f"process_{index}" in name)
        assert own > 4 << 20
        saves = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        assert len(saves) == 2
        for counted in saves:
            assert own <= counted["rchar"] < 1.05 * own and own <= counted["wchar"] < 1.05 * own, (own, counted)


if __name__ == "__main__":
    save_and_count(*sys.argv[1:])


@pytest.mark.parametrize("billions", [0.067, 0.134, 1.07, 2.01, 13.33])
def test_a_milestone_that_a_step_hits_exactly_is_not_late(tmp_path, billions):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(milestones=[billions]), tokens_per_step=10**6, meta={})
    assert [step for step in range(1, 13_400) if checkpointer.is_milestone(step)] == [round(billions * 1000)]
    checkpointer.close()


def test_milestones_of_padded_rows_are_reached_by_their_tokens(tmp_path):
    tokens = [0, 400, 700, 1500, 1600]
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(milestones=[7e-7, 1e-6, 1.6e-6]), tokens_per_step=1000,
                                tokens_at=tokens.__getitem__, meta={})
    assert [step for step in range(1, 5) if checkpointer.is_milestone(step)] == [2, 3, 4]
    checkpointer.close()
