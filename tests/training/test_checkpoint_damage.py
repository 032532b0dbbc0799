"""A damaged file of a checkpoint is noticed, and the newest whole step taken; or it makes no difference."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pretrain import CheckpointConfig
from ctllm_jax.training.checkpoints import files
from ctllm_jax.training.checkpoints.checkpoint import find_checkpoint, list_checkpoints, load_params
from ctllm_jax.training.checkpoints.checkpointer import Checkpointer
from ctllm_jax.training.checkpoints.streaming import stream_parameters
from tests.runs import DEBUG, REPOSITORY, cached, environment
from tests.training.test_checkpoint import TOKENS, abstract_state, make_state, save, steps_in


def open_run(directory, **config):
    return Checkpointer(directory, CheckpointConfig(every=1, **config), tokens_per_step=TOKENS, meta={"eod_id": 3})


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A run directory with steps 1 and 2, and the weights of step 2 as a milestone."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    directory.mkdir()
    (directory / "config.yaml").touch()
    checkpointer = open_run(directory, milestones=[2e-6])
    save(checkpointer, [1, 2])
    checkpointer.close()
    return directory


@pytest.fixture
def run_dir(tmp_path, two_steps):
    """A copy of it."""
    shutil.copytree(two_steps, tmp_path / "run")
    return tmp_path / "run"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {"flipped": flip, "truncated": truncate, "deleted": lambda path: path.unlink()}


def assert_restores(checkpointer, step):
    restored, wanted = checkpointer.restore(abstract_state(), step=step), make_state(step)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file(two_steps, tmp_path, damage):
    """Each file of a real step in turn: it is in quarantine with that file named, or restores the same numbers."""
    names = sorted(str(path.relative_to(two_steps / "checkpoints/2"))
                   for path in (two_steps / "checkpoints/2").rglob("*") if path.is_file())
    harmless = []
    for number, name in enumerate(names):
        directory = tmp_path / str(number)
        shutil.copytree(two_steps, directory)
        DAMAGES[damage](directory / "checkpoints/2" / name)
        checkpointer = open_run(directory)
        if checkpointer.latest() == 1:
            assert_restores(checkpointer, 1)
            assert steps_in(directory / "quarantine") == [2] and steps_in(directory / "checkpoints") == [1]
            reason = (directory / "quarantine/2.txt").read_text()
            assert f"\n{name}: " in reason, (name, reason)
        else:
            harmless.append(name)
            assert_restores(checkpointer, 2)
            assert checkpointer.read_meta(2)["step"] == 2
        checkpointer.close()
        shutil.rmtree(directory)
    assert len(names) > 20
    # What Orbax writes last, and never reads here; and the manifest itself, if it is not there at all.
    assert set(harmless) == {"commit_success.txt", *["manifest.json"] * (damage == "deleted")}


def test_it_is_told_with_the_file_and_the_step_taken(run_dir, caplog):
    (victim,) = [path for path in run_dir.glob("checkpoints/2/params/ocdbt.process_0/d/*")
                 if path.stat().st_size == max(each.stat().st_size for each in path.parent.iterdir())]
    flip(victim)
    checkpointer = open_run(run_dir)
    assert checkpointer.latest() == 1
    told = (f"the checkpoint of step 2 is damaged, and is in {run_dir}/quarantine/2 now: params/ocdbt.process_0/d/"
            f"{victim.name}: its crc32 is another: bytes were changed; continuing from step 1")
    assert told in caplog.text
    recorded, shown = [], []
    checkpointer.listen(shown.append, record=recorded.append)
    assert recorded == [told] and not shown
    # The step is made and kept again; should it be damaged again, it lies beside the first.
    save(checkpointer, [2])
    checkpointer.close()
    flip(next(run_dir.glob("checkpoints/2/trainer/d/*")))
    again = open_run(run_dir)
    assert again.latest() == 1 and steps_in(run_dir / "checkpoints") == [1]
    assert {path.name for path in (run_dir / "quarantine").iterdir()} == {"2", "2.txt", "2-2", "2-2.txt"}
    again.close()


def test_sizes_alone_and_nothing_at_all(run_dir):
    """`checkpoint.verify=size` sees what is cut off and not what is flipped; `off` sees neither."""
    biggest = max(run_dir.glob("checkpoints/2/params/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    flip(biggest)
    for level, found in (("size", 2), ("off", 2)):
        checkpointer = open_run(run_dir, verify=level)
        assert checkpointer.latest() == found
        checkpointer.close()
    truncate(biggest)
    for level, found in (("off", 2), ("size", 1)):
        checkpointer = open_run(run_dir, verify=level)
        assert checkpointer.latest() == found
        checkpointer.close()


def test_no_step_is_whole(run_dir):
    """Such a run does not begin again at step 0 without a word, not even when it is started twice."""
    for step in (1, 2):
        truncate(run_dir / f"checkpoints/{step}/meta/metadata")
    for _ in range(2):
        checkpointer = open_run(run_dir)
        with pytest.raises(UserError, match=rf"no checkpoint of {run_dir} is whole; none was moved or removed:"
                                            r"\n  step 2: meta/metadata: has 26 bytes, and 53 were written"):
            checkpointer.latest()
        checkpointer.close()
        assert steps_in(run_dir / "checkpoints") == [1, 2]


def test_every_step_is_in_quarantine(run_dir):
    """An earlier version moved the last copy, too; the run still does not begin again without a word."""
    for step in (1, 2):
        files.quarantine(run_dir / f"checkpoints/{step}", ["meta/metadata: has 1 bytes"])
    checkpointer = open_run(run_dir)
    with pytest.raises(UserError, match=rf"no checkpoint of {run_dir} is whole: 1, 2 in {run_dir}/quarantine"):
        checkpointer.latest()
    checkpointer.close()


def test_steps_of_before_there_were_manifests(run_dir, caplog):
    for step in (1, 2):
        (run_dir / f"checkpoints/{step}/manifest.json").unlink()
    checkpointer = open_run(run_dir)
    assert checkpointer.latest() == 2
    assert "2 has no manifest (an older version wrote it): its arrays can be read" in caplog.text
    checkpointer.close()
    for path in run_dir.glob("checkpoints/2/trainer/**/d/*"):
        truncate(path)
    checkpointer = open_run(run_dir)
    assert checkpointer.latest() == 1
    assert re.search("trainer: .* cannot be read", (run_dir / "quarantine/2.txt").read_text())
    checkpointer.close()


def test_a_file_that_may_not_be_read_is_no_damaged_one(run_dir, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "_measure", refuse)
    checkpointer = open_run(run_dir)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        checkpointer.latest()
    assert steps_in(run_dir / "checkpoints") == [1, 2] and not (run_dir / "quarantine").exists()
    checkpointer.close()


def test_other_commands_do_not_load_it(run_dir):
    """Weights by their name: the file is named, and what else there is; nothing is moved."""
    params = abstract_state().params
    flip(next(run_dir.glob("milestones/2/params/d/*")))
    resumable, milestone = [kept for kept in list_checkpoints(run_dir) if kept.step == 2][::-1]
    load_params(resumable, params)
    for load in (lambda: load_params(milestone, params), lambda: list(stream_parameters(milestone))):
        with pytest.raises(UserError, match=rf"the weights of {run_dir}/milestones/2 are damaged: params/d/\w+: its"
                                            rf" crc32 is another: bytes were changed; {run_dir} also has step 1 "):
            load()
    # The optimizer's state is not what a model is made of.
    flip(next(run_dir.glob("checkpoints/1/trainer/d/*")))
    loaded = load_params(find_checkpoint(f"{run_dir}@1")[1], params)
    np.testing.assert_array_equal(loaded["w"], make_state(1).params["w"])


def test_a_checkpoint_that_does_not_say_what_it_is(run_dir):
    (run_dir / "checkpoints/1/meta/metadata").write_text("{")
    with pytest.raises(UserError, match=f"{run_dir}/checkpoints/1 are damaged: meta/metadata: has 1 bytes"):
        find_checkpoint(f"{run_dir}@1")
    (run_dir / "checkpoints/1/manifest.json").unlink()
    with pytest.raises(UserError, match=f"{run_dir}/checkpoints/1/meta/metadata is damaged: it does not say what"):
        find_checkpoint(f"{run_dir}@1")


def test_what_does_not_fit_is_named_before_anything_is_restored(run_dir):
    """Orbax would cast a dtype without a word."""
    checkpointer, wanted = open_run(run_dir), abstract_state()
    wanted.params["w"] = jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=wanted.params["w"].sharding)
    with pytest.raises(UserError) as caught:
        checkpointer.restore(wanted, step=2)
    assert str(caught.value).splitlines() == [
        f"what is kept in {run_dir}/checkpoints/2 is not what this run would go on with:",
        "  params.w: float32 [8] there, bfloat16 [8] here"]
    wanted = abstract_state()
    wanted.params["v"] = wanted.params["w"]
    with pytest.raises(UserError, match=r"params.v: absent there, float32 \[8\] here"):
        checkpointer.restore(wanted.replace(step=wanted.params["w"]), step=2)
    checkpointer.close()


def test_what_a_killed_process_left_goes_away(run_dir):
    (run_dir / "checkpoints/trash/1").mkdir(parents=True)
    shutil.copytree(run_dir / "checkpoints/2", run_dir / "checkpoints/3.orbax-checkpoint-tmp")
    open_run(run_dir).close()
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"1", "2"}


def test_failed_saves_in_a_row(run_dir, monkeypatch):
    """As many as the config tolerates are told; one more is raised. What is kept stays."""
    checkpointer = open_run(run_dir, tolerate_failures=2, keep_last=1)
    told = []
    checkpointer.listen(lambda text: None, record=told.append)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 20))
    assert not checkpointer.save(make_state(3), step=3) and not checkpointer.save(make_state(4), step=4)
    said = [re.search(r"of step (\d): it takes .* \(failed save (\d) of 2 in a row", text).groups() for text in told]
    assert said == [("3", "1"), ("4", "2")]
    with pytest.raises(UserError, match="no room for the checkpoint of step 5"):
        checkpointer.save(make_state(5), step=5)
    monkeypatch.undo()
    assert steps_in(run_dir / "checkpoints") == [1, 2]
    # One that gets onto the disk ends the row; what comes to nothing at the end of a run is raised in any case.
    assert checkpointer.save(make_state(6), step=6)
    checkpointer.wait()
    assert steps_in(run_dir / "checkpoints") == [6]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 20))
    assert not checkpointer.save(make_state(7), step=7) and len(told) == 3
    with pytest.raises(UserError, match="no room for the checkpoint of step 7"):
        checkpointer.close()


REAL_FAULTS = """
import faulthandler, json, os, resource, sys
from pathlib import Path
from tests.training.test_checkpoint_damage import make_state, open_run, steps_in

faulthandler.dump_traceback_later(40, exit=True)
run_dir, told = Path(sys.argv[1]), []
checkpointer = open_run(run_dir, tolerate_failures=1, keep_last=9)
checkpointer.listen(lambda text: None, record=told.append)


def failing(step):
    checkpointer.save(make_state(step), step=step)
    assert not checkpointer.save(make_state(2), step=2), "step 2 is there"


resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
failing(3)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert checkpointer.save(make_state(4), step=4)
checkpointer.wait()
os.chown(run_dir / "checkpoints", 0, 0)
(run_dir / "checkpoints").chmod(0o555)
os.setegid(65534)
os.seteuid(65534)
failing(5)
os.seteuid(0)
(run_dir / "checkpoints").chmod(0o755)
assert checkpointer.save(make_state(6), step=6)
checkpointer.close()
print(json.dumps([told, steps_in(run_dir / "checkpoints"), sorted(os.listdir(run_dir / "checkpoints"))]))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_real_faults_of_the_disk(two_steps):
    """A limit on the size of files, and a directory of somebody else: each tolerated, and over when it is over."""
    with tempfile.TemporaryDirectory() as folder:  # pytest keeps its own directories closed to other users
        run_dir = shutil.copytree(two_steps, Path(folder) / "run")
        for path in (run_dir.parent, run_dir):
            path.chmod(0o711)
        check_real_faults(run_dir)


def check_real_faults(run_dir):
    done = subprocess.run([sys.executable, "-c", REAL_FAULTS, str(run_dir)], check=False, capture_output=True,
                          text=True, timeout=60, cwd=REPOSITORY, env=environment())
    assert done.returncode == 0, done.stderr
    told, steps, names = json.loads(done.stdout.splitlines()[-1])
    advice = "and give the same command again: it goes on from step"
    assert len(told) == 2 and f"File too large; make room there {advice} 2" in told[0], told
    assert f"Permission denied; make it writable {advice} 4" in told[1], told
    # Orbax's threads would each tell the same with their stacks.
    assert "ERROR:absl" not in done.stderr, done.stderr
    assert steps == [1, 2, 4, 6] and names == ["1", "2", "4", "6"]


FULL_DISK = f"""
set -e
mount -t tmpfs -o size=2m none "$1"
train="from ctllm_jax.cli import main; raise SystemExit(main(['pretrain', '{DEBUG}', 'run.dir=$1/run',
    'checkpoint.every=1', 'checkpoint.keep_last=9', 'steps=5', 'optimizer.schedule=constant']))"
free="import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(0, 0, 1 << 40)"
echo "--- filled while writing"; "$2" -c "$free; $train" && exit 9
ls "$1/run/checkpoints"
echo "--- full before"; "$2" -c "$train" && exit 9
ls "$1/run/checkpoints"
mount -o remount,size=8m "$1"
echo "--- with room"; "$2" -c "$train"
ls "$1/run/checkpoints"
"""


def test_a_real_disk_that_fills_up(tmp_path, tmp_path_factory):
    """Three runs on a disk of 2 MiB, which a namespace of their own sees: the third, given room, goes to the end."""
    namespace = next((words for words in (["unshare", "-m"], ["unshare", "-rm"])
                      if subprocess.run([*words, "mount", "-t", "tmpfs", "none", str(tmp_path)], check=False,
                                        stderr=subprocess.DEVNULL).returncode == 0), None)
    if namespace is None:
        pytest.skip("mounts are not allowed here; the tests beside this one fail the disk by other means")
    compiled = cached(tmp_path_factory.mktemp("compiled"))
    done = subprocess.run([*namespace, "bash", "-c", FULL_DISK, "full-disk", str(tmp_path), sys.executable],
                          check=False, capture_output=True, text=True, timeout=300, cwd=REPOSITORY,
                          env=environment(**compiled))
    assert done.returncode == 0, done.stdout + done.stderr
    filled, full, room = done.stdout.split("---")[1:]
    assert filled.splitlines()[-3:] == full.splitlines()[-3:] == ["1", "2", "3"], done.stdout + done.stderr
    assert "resuming" in room and set(room.splitlines()[-5:]) == set("12345")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    again = "make room there and give the same command again: it goes on from step 3"
    assert errors[0] == (f"error: a checkpoint could not be written below {tmp_path}/run: No space left on device;"
                         f" {again}")
    assert errors[1].startswith("error: no room for the checkpoint of step 4: it takes 0.5 MiB") and again in errors[1]
    assert len(errors) == 2 and "Traceback" not in done.stderr.partition(errors[1])[2]
