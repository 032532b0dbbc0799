"""`checkpoint ls`, `verify`, `diff`, `prune`."""

import os
import re
import shutil

import numpy as np
import pytest

from ctllm_jax.config.pretrain import RunConfig
from ctllm_jax.training.supervision.lock import own
from tests.cli.conftest import call
from tests.runs import read_arrays


def cells(printed):
    """The rows of the table, cell by cell."""
    assert printed.status == 0, printed.err
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.out.splitlines() if "MiB" in line]


def test_every_checkpoint_by_the_name_that_loads_it(text_run):
    rows = cells(call("checkpoint", "ls", text_run.directory))
    assert [row[:3] for row in rows] == [[f"{text_run.directory}@2", "resumable", "1,024"],
                                         [f"{text_run.directory}@3", "resumable", "1,536"]]
    for row in rows:
        assert row[5] == "sizes as written"
        assert re.fullmatch(r"0\.[5-9] MiB", row[3]) and re.fullmatch(r"\d{4}(-\d\d){2} [\d:]{8}", row[4])


def test_several_runs_and_one_without(text_run, tmp_path):
    (tmp_path / "config.yaml").touch()
    printed = call("checkpoint", "ls", text_run.directory, tmp_path)
    assert len(cells(printed)) == 2 and f"{tmp_path}: no checkpoint yet" in printed.out


def test_a_milestone_is_called_one(text_run, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(text_run.directory, directory)
    (directory / "milestones").mkdir()
    (directory / "checkpoints/2").rename(directory / "milestones/2")
    rows = cells(call("checkpoint", "ls", directory))
    assert [row[:2] for row in rows] == [[f"{directory}@2", "milestone"], [f"{directory}@3", "resumable"]]


def test_no_run_directory(tmp_path):
    printed = call("checkpoint", "ls", tmp_path)
    assert printed.status == 2 and f"{tmp_path} is no run directory" in printed.err


@pytest.fixture
def run_dir(text_run, tmp_path):
    """A copy of the run, to be damaged."""
    shutil.copytree(text_run.directory, tmp_path / "run")
    return tmp_path / "run"


def damage(step):
    """A byte of the largest file of its weights; returns the file's name."""
    file = max(step.glob("params/**/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    return str(file.relative_to(step))


def test_verify_names_what_is_damaged(run_dir):
    printed = call("checkpoint", "verify", run_dir)
    assert printed.status == 0 and printed.out.count("whole (0.") == 2 and "DAMAGED" not in printed.out
    name = damage(run_dir / "checkpoints/3")
    for target, status in ((run_dir, 1), (f"{run_dir}@3", 1), (f"{run_dir}@2", 0)):
        printed = call("checkpoint", "verify", target)
        assert printed.status == status, printed
        assert (f"  {name}: its crc32 is another: bytes were changed" in printed.out) == bool(status)
    (run_dir / "checkpoints/2/meta/metadata").unlink()
    assert "  meta/metadata: is missing" in call("checkpoint", "verify", f"{run_dir}@2").out
    assert cells(call("checkpoint", "ls", run_dir))[0][5] == "DAMAGED: meta/metadata: is missing"
    assert "has no step 9; it has 2, 3" in call("checkpoint", "verify", f"{run_dir}@9").err


def test_verify_without_a_manifest(run_dir):
    (run_dir / "checkpoints/3/manifest.json").unlink()
    printed = call("checkpoint", "verify", run_dir)
    assert printed.status == 0 and "no manifest; every array can be read" in printed.out
    for file in (run_dir / "checkpoints/3/params").glob("**/d/*"):
        os.truncate(file, 10)
    printed = call("checkpoint", "verify", run_dir)
    assert printed.status == 1 and re.search("  params: .* cannot be read", printed.out)


def test_diff_gives_the_numbers_of_the_arrays(run_dir):
    printed = call("checkpoint", "diff", f"{run_dir}@2", f"{run_dir}@3")
    there, here = read_arrays(run_dir, 2), read_arrays(run_dir, 3)
    name = "params['embedding']"
    norms = [float(np.linalg.norm(side[name].astype(np.float64))) for side in (there, here)]
    largest = np.abs(there[name] - here[name]).max()
    row = next(line for line in printed.out.splitlines() if "params.embedding" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][2:] == [
        *(f"{norm:.6g}" for norm in norms), f"{largest:.3g}", "differ"]
    assert printed.status == 1 and "12 arrays: 0 equal bit for bit, 12 not" in printed.out
    same = call("checkpoint", "diff", f"{run_dir}@3", run_dir, "optimizer=true")
    assert same.status == 0 and f"{len(here)} arrays: {len(here)} equal bit for bit, 0 not" in same.out
    assert "and was given 1" in call("checkpoint", "diff", run_dir).err


def test_prune_keeps_the_newest_that_is_whole(run_dir):
    for step in (4, 6, 7):
        shutil.copytree(run_dir / "checkpoints/3", run_dir / f"checkpoints/{step}")
    shutil.copytree(run_dir / "checkpoints/3", run_dir / "milestones/3")
    damage(run_dir / "checkpoints/7")
    listed = call("checkpoint", "prune", run_dir, "keep=1", "every=4")
    assert listed.status == 0 and "nothing was deleted: give delete=true" in listed.out
    assert re.findall(r"would delete \S+/(\S+/\d+) ", listed.out) == ["checkpoints/2", "checkpoints/3"]
    with own(RunConfig(dir=str(run_dir)), what="a test"):
        refused = call("checkpoint", "prune", run_dir, "keep=1", "every=4", "delete=true")
        assert refused.status == 2 and f"in use by process {os.getpid()}" in refused.err
    assert len(list((run_dir / "checkpoints").iterdir())) == 5
    done = call("checkpoint", "prune", run_dir, "keep=1", "every=4", "delete=true")
    assert done.status == 0 and "what stays: 3 (milestone), 4 (resumable), 6 (resumable), 7 (resumable)" in done.out
    call("checkpoint", "prune", run_dir, "keep=0", "milestones=true", "delete=true")
    # The newest of each kind that is whole, and nothing in the trash.
    assert sorted(os.listdir(run_dir / "checkpoints")) == ["6", "trash"] and os.listdir(run_dir / "milestones") == ["3"]
    assert os.listdir(run_dir / "checkpoints/trash") == []
