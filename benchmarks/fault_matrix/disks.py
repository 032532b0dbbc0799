"""Disks that are full, directories that cannot be written, files that may not grow."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys

from fault_matrix.bench import Bench, Done, Lost, NotTried, Outcome, fault, work_again
from tests.runs import DEBUG, REPOSITORY
from tests.training.test_checkpoint_damage import FULL_DISK

STEPS = 5
OVERRIDES = ("checkpoint.every=1", "checkpoint.keep_last=9", "optimizer.schedule=constant")
WHOLE = (*OVERRIDES, f"steps={STEPS}")
READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'


def _namespace(bench: Bench) -> list[str]:
    """How to begin a process that may mount, which nobody else sees."""
    folder = bench.directory()
    folder.mkdir()
    for words in (["unshare", "-m"], ["unshare", "-rm"]):
        try:
            if not subprocess.run([*words, "mount", "-t", "tmpfs", "none", folder], check=False,
                                  capture_output=True).returncode:
                return words
        except FileNotFoundError:
            break
    raise NotTried("mounts are not allowed here")


def _begin(bench: Bench, *, steps: int = 2):
    """A run that has `steps` steps, all kept."""
    run = bench.directory()
    bench.pretrain(run, *OVERRIDES, f"steps={steps}").expect(0)
    return run


def _judge(bench: Bench, outcome: Outcome, run, refused: Done, said: str, *, faults: int = 1) -> None:
    """The fault was told, by the last line; when it is over the same command goes to the same end."""
    try:
        last = refused.text.rstrip().rpartition("\n")[2]
        Done(refused.status, last).expect(2, said)
        bench.pretrain(run, *WHOLE).expect(0)
        problem = bench.differing([run], bench.undisturbed(*WHOLE), step=STEPS).get(str(run), "")
    except Lost as lost:
        problem = str(lost)
    outcome.message = bench.line(refused.text, said)
    outcome.add(problem, faults=faults, again=work_again(run))


@fault("disk-full", "a disk of 2 MiB that fills up while a step is written, and is full before the next")
def disk_full(bench: Bench, outcome: Outcome) -> None:
    """The third time it has room."""
    namespace, disk, kept = _namespace(bench), bench.directory(), bench.directory()
    disk.mkdir()
    ran = subprocess.run([*namespace, "bash", "-c", f'{FULL_DISK}cp -r "$1/run" "$3"', "full-disk", str(disk),
                          sys.executable, str(kept)], check=False, capture_output=True, text=True, cwd=REPOSITORY,
                         env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    if ran.returncode:
        raise Lost(f"{ran.stdout}{ran.stderr}"[-500:])
    differing = bench.differing([kept], bench.undisturbed(*WHOLE), step=STEPS)
    outcome.message = bench.line(ran.stderr, "^error: no room")
    outcome.add(differing.get(str(kept), ""), faults=2, again=work_again(kept))


@fault("file-limit", "a limit of 64 KiB on the size of a file (RLIMIT_FSIZE)")
def file_limit(bench: Bench, outcome: Outcome) -> None:
    """A step has files of 300 KiB."""
    bench.undisturbed(*WHOLE)
    run = _begin(bench)
    refused = bench.pretrain(run, *WHOLE, prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16)))
    _judge(bench, outcome, run, refused, "could not be written below .*: File too large")


@fault("read-only", "a run directory on a disk that is mounted read-only")
def read_only(bench: Bench, outcome: Outcome) -> None:
    """A mount that only this process sees."""
    namespace, run = _namespace(bench), _begin(bench)
    ran = subprocess.run([*namespace, "bash", "-c", READ_ONLY, "read-only", str(run), sys.executable, "launch.py",
                          "pretrain", DEBUG, f"run.dir={run}", *WHOLE], check=False, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY,
                         env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    _judge(bench, outcome, run, Done(ran.returncode, ran.stdout), "cannot be written: .*Read-only file system")


@fault("other-user", "a run directory, and then its checkpoints alone, of another user (EACCES)")
def other_user(bench: Bench, outcome: Outcome) -> None:
    """Root without the right to override what a directory allows; others take their own right to write away."""
    root = os.getuid() == 0
    for part, said in (("", "cannot be written: .*Permission denied"),
                       ("checkpoints", "could not be written below .*: Permission denied")):
        run = _begin(bench)
        os.chown(run / part, 65534 if root else -1, -1)
        (run / part).chmod(0o755 if root else 0o555)
        try:
            refused = bench.pretrain(run, *WHOLE, prepare=_obey_permissions if root else lambda: None)
        finally:
            (run / part).chmod(0o755)
        _judge(bench, outcome, run, refused, said)


def _obey_permissions() -> None:
    """Take CAP_DAC_OVERRIDE from this process: each of its three sets, as capget(2) lays them out."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    failed = libc.capget(header, sets)
    for number in range(3):
        sets[number] &= ~(1 << 1)
    if failed or libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")
