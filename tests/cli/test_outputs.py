"""Outputs that cannot be written are refused before the work; an error of a file is a sentence, and no traceback."""

import errno
import importlib
import os
import stat
import subprocess
import sys

import pytest

from ctllm_jax.cli import COMMANDS
from ctllm_jax.cli.outputs import check_writable
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.types import keys_of
from tests.cli.conftest import call
from tests.runs import REPOSITORY


@pytest.mark.parametrize("words", [
    ["quickstart", "run.dir=FILE/x"], ["quickstart", "data.sources.zh=FILE/zh", "data.sources.en=FILE/en",
                                       "data.sources.code=FILE/code"],
    ["pretrain", "debug/pretrain", "run.dir=FILE/x"],
    ["sft", "quickstart/sft", "init=nowhere", "run.dir=FILE"],
    ["dpo", "quickstart/dpo", "init=nowhere", "run.dir=FILE"],
    ["sweep", "pretrain", "debug/pretrain", "vary.seed=1,2", "run.dir=FILE/x"],
    ["import-hf", "nowhere", "output=FILE/x"], ["export-hf", "nowhere", "output=FILE/x"],
    ["lora", "merge", "nowhere", "output=FILE/x"], ["doctor", "output=FILE/x"],
    ["evaluate", "nowhere", "tasks=mmlu", "output=FILE/x"], ["generate", "nowhere", "prompts=p", "output=FILE/x.jsonl"],
    ["pairs", "data=p", "rejected=nowhere", "output=FILE/x.jsonl"], ["tables", "nowhere", "output=FILE/x.md"],
    ["judge", "nowhere", "questions=q", "judge.base_url=http://localhost:1/v1", "judge.model=m", "output=FILE/x"],
    ["plan", "small/150m", "budget=1B", "topology=h100:8", "output=FILE/x"], ["kernels", "check", "output=FILE/x"],
    ["compile", "debug/pretrain", "topology=v5p-8", "output=FILE/x"], ["report", "nowhere", "output=FILE/x.html"],
    ["job", "slurm", "debug/pretrain", "job.output=FILE/x"]], ids=lambda words: " ".join(words[:2]))
def test_an_output_below_a_file_is_refused_first(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("whole")
    printed = call(*words)
    assert printed.status == 2 and printed.out == ""
    assert "cannot be written: FILE: Not a directory: choose a path below a folder" in printed.err
    assert os.listdir(tmp_path) == ["FILE"] and (tmp_path / "FILE").read_text() == "whole"


def test_every_key_called_output_is_checked():
    """Of commands that check theirs by the schema; those of `prepare` and `tokenizer` check them by themselves."""
    for command in set(COMMANDS) - {"prepare", "tokenizer"}:
        module = importlib.import_module(f"ctllm_jax.cli.{command.replace('-', '_')}")
        for schema in (*getattr(module, "ACTIONS", {}).values(), getattr(module, "SCHEMA", None)):
            for path, info in keys_of(schema) if schema else ():
                if path.rpartition(".")[2] == "output":
                    assert info.json_schema_extra.get("output") in ("file", "folder"), (command, path)


def test_what_can_be_written(tmp_path):
    (tmp_path / "old").write_text("")
    for path, kind in (("old", "file"), ("new", "file"), ("a/b/new", "file"), (".", "folder"), ("a/b", "folder")):
        check_writable(tmp_path / path, "output", kind=kind)
    check_writable("/dev/stdout", "output", kind="file")
    check_writable("gs://bucket/runs/x", "output")
    assert [path.name for path in tmp_path.iterdir()] == ["old"], "nothing is made"
    for path, kind in (("old", "folder"), (".", "file"), ("old/x", "file")):
        with pytest.raises(UserError, match="output cannot be written"):
            check_writable(tmp_path / path, "output", kind=kind)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="output cannot be written: .*link: Not a directory"):
        check_writable(tmp_path / "link" / "x", "output")


@pytest.mark.parametrize(("error", "message", "status"), [
    (OSError(errno.ENOSPC, "No space left on device"), "one of output=t.md: No space left on device: free some", 1),
    (OSError(errno.EROFS, "Read-only file system", "/a/b"), "/a/b: Read-only file system: choose a path on", 2),
    (PermissionError(errno.EACCES, "Permission denied", b"/a\x1b[2J"), "/a␛[2J: Permission denied: change its", 2),
    (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), "a -> b: Invalid cross-device link: check", 1),
    (OSError(errno.EIO, "Input/output error", 3), "a file: Input/output error: check the disk", 1),
    (OSError("a library's own"), "one of output=t.md: a library's own: check the disk or the connection", 1)])
def test_an_error_of_a_file_is_a_sentence(error, message, status, monkeypatch, tmp_path):
    def fail(context):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ctllm_jax.cli.tables.run", fail)
    printed = call("tables", "output=t.md")
    assert printed.status == status and printed.err.startswith(f"error: {message}") and printed.err.count("\n") == 1


def test_an_unexpected_error_is_a_sentence_and_keeps_its_traceback(monkeypatch, tmp_path):
    def fail(context):
        raise KeyError("a\x1b[2J\nb" + "x" * 2000)

    monkeypatch.setattr("ctllm_jax.cli.tables.run", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("CTLLM_TRACEBACK", raising=False)
    kept = call("tables")
    file, = tmp_path.iterdir()
    assert kept.status == 1 and kept.err.startswith("error: KeyError: ") and kept.err.count("\n") == 1
    assert str(file) in kept.err and len(kept.err) < 800
    assert "in fail" in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600
    file.unlink()
    monkeypatch.setenv("CTLLM_TRACEBACK", "1")
    shown = call("tables")
    assert shown.status == 1 and shown.err.startswith("Traceback") and "in fail" in shown.err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("CTLLM_TRACEBACK")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert call("tables").err.startswith("Traceback"), "where no file can be written, it is printed"


def test_a_command_that_cannot_be_imported_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.delenv("CTLLM_TRACEBACK", raising=False)
    monkeypatch.setitem(sys.modules, "ctllm_jax.cli.tables", None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    printed = call("tables")
    assert printed.status == 1 and printed.err.startswith("error: ModuleNotFoundError: import of ctllm_jax.cli.tables")


MOUNT = """
set -e
mkdir {folder}/full {folder}/locked
mount -t tmpfs -o size=16k none {folder}/full
mount -t tmpfs -o ro none {folder}/locked
cd {folder}/full
cat /dev/zero > filler 2>/dev/null || true
{launch} job slurm debug/pretrain job.output=j.sbatch || echo "status $?"
cd {folder}/locked
{launch} quickstart || echo "status $?"
"""


def test_a_full_disk_and_a_read_only_one(tmp_path):
    """In a mount namespace of its own: no other process sees these file systems."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", str(tmp_path)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no user and mount namespaces here")
    script = MOUNT.format(folder=tmp_path, launch=f"{sys.executable} {REPOSITORY / 'launch.py'}")
    done = subprocess.run([*unshare, "sh", "-c", script], capture_output=True, text=True)
    errors = done.stderr.splitlines()
    assert done.returncode == 0 and done.stdout.count("status ") == len(errors) == 2, done
    assert errors[0].startswith("error: job.output=j.sbatch cannot be written: .: No space left on device: free some")
    assert errors[1] == ("error: run.dir=runs/quickstart cannot be written: .: Read-only file system: choose a path on "
                         "a file system that can be written")


def test_results_follow_the_umask(tmp_path):
    from ctllm_jax.evaluation.judge.judge import write_record
    from ctllm_jax.evaluation.results import write_result
    from ctllm_jax.report.page import save

    for mask, mode in ((0o077, 0o600), (0o027, 0o640)):
        before = os.umask(mask)
        try:
            made = [save("<p>", tmp_path / f"{mask}" / "report.html"), write_record(tmp_path / f"{mask}.json", {})]
            write_result(tmp_path / f"{mask}.result.json", {})
        finally:
            os.umask(before)
        for path in (*made, tmp_path / f"{mask}.result.json"):
            assert stat.S_IMODE(path.stat().st_mode) == mode, path
    assert not [path for path in tmp_path.rglob(".*")], "no temporary file is left"
