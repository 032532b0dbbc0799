"""The files of a checkpoint: the manifest, the check against it, quarantine, and the removal of steps.

RUN/checkpoints/STEP/manifest.json and RUN/milestones/STEP/manifest.json hold the size and the crc32 (on an object store
the MD5) of every file of the step. Each process computes them for the files that it wrote, and the first process merges
the results. RUN/quarantine/ holds damaged steps, each with the reason in a text file next to it. A step is removed by
renaming it into a folder `trash`, which is then emptied, so an incompletely removed step is never read as a complete
one. On an object store nothing is renamed: see `objects`.
No jax, because commands without devices check files, too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from ctllm_jax import storage
from ctllm_jax.config.errors import UserError
from ctllm_jax.training.checkpoints import objects
from ctllm_jax.training.checkpoints.objects import COMMITTED

log = logging.getLogger(__name__)
FORMAT = 1
"""The format of the checkpoints that this version writes, in their `meta`; one without it is of format 1."""
CHECKPOINTS, MILESTONES = "checkpoints", "milestones"
TRASH, QUARANTINE = "trash", "quarantine"
MANIFEST = "manifest.json"
STEP_METADATA = "_CHECKPOINT_METADATA"
"""Orbax's list of the parts of a step."""
_TEMPORARY = re.compile(r"\.orbax-checkpoint-tmp[^/]*")
_CRC32, _MD5 = "crc32", "md5"
_BLOCK = 4 << 20
_MOST_THREADS = 4
_SUMS = ".sums-"
"""File name, followed by the process number, with the results of one process until they are in the manifest."""


def write_sums(folder: Path, *, process: int) -> None:
    """Flush the files of a step that this process wrote to the disk, and record their sizes and checksums.

    Only the machine that wrote a file can flush it, and it reads the file from its page cache. The first process
    handles the files that no other process has handled.
    """
    mine = [path for item in folder.glob(f"*/ocdbt.process_{process}") for path in item.rglob("*") if path.is_file()]
    mine += folder.glob(f"*/array_metadatas/process_{process}")
    try:
        measured = _over_files(lambda path: _measure(path, sync=True), mine)
        # An item gets its final name after all processes have written.
        names = [_TEMPORARY.sub("", path.relative_to(folder).as_posix()) for path in mine]
        text = json.dumps(dict(zip(names, measured, strict=True)))
        (folder / f"{_SUMS}{process}").write_text(text, encoding="utf-8")
    except OSError as error:
        log.warning("process %d cannot measure its files below %s (%s): the first process does", process, folder, error)


def write_manifest(folder: Path) -> None:
    """Flush every file below `folder`, and write the manifest with their sizes and checksums.

    Nothing may write there any more. A GiB takes 0.3 CPU seconds; zlib releases the interpreter lock.

    Raises:
      OSError: a file cannot be read, or the manifest cannot be written.
    """
    if storage.is_remote(folder):
        text = _manifest_text({name: [entry.size, entry.md5] if entry.md5 else _measure(folder / name)
                               for name, entry in storage.list_objects(folder).items()
                               if name.rpartition("/")[2] not in (MANIFEST, COMMITTED)}, checksum=_MD5)
        with storage.told(folder):
            (folder / MANIFEST).write_text(text, encoding="utf-8")
        return
    files = _take_sums(folder)
    names = sorted(name for name in _names(folder) if name not in (MANIFEST, COMMITTED, *files))
    files |= zip(names, _over_files(lambda name: _measure(folder / name, sync=True), names), strict=True)
    temporary = folder / f".{MANIFEST}"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(_manifest_text(files, checksum=_CRC32))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)


def _take_sums(folder: Path) -> dict[str, list[Any]]:
    """Merge the results of all processes, and remove their files."""
    files: dict[str, list[Any]] = {}
    for path in folder.glob(f"{_SUMS}*"):
        with suppress(ValueError):  # truncated: its files are handled here
            files |= json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    return files


def _manifest_text(files: dict[str, list[Any]], *, checksum: str) -> str:
    entries = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(files.items()))
    return f'{{"checksum": "{checksum}", "own": "{_own_checksum(files)}", "files": {{\n{entries}\n}}}}\n'


def find_damage(folder: Path, *, level: Literal["full", "size"] = "full",
                parts: Sequence[str] | None = None) -> list[str] | None:
    """Return the problems of the files of a step, one line each that begins with the file; None: it has no manifest.

    Args:
      level: full compares sizes and checksums, size only sizes.
      parts: check only these folders (`params`, `meta`, `trainer`); None: everything.

    Raises:
      UserError: a file cannot be read for lack of permission, so its content is unknown.
      FileNotFoundError: the step does not exist any more.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): [int(size), str(checksum)] for name, (size, checksum) in manifest["files"].items()}
        checksum = manifest["checksum"]
        if manifest["own"] != _own_checksum(files) or checksum not in (_CRC32, _MD5):
            raise ValueError("its own checksum")
    except FileNotFoundError:
        if not folder.is_dir():
            raise
        return None
    except OSError as error:
        return [f"{MANIFEST}: {_unreadable(folder / MANIFEST, error)}"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST}: is not what was written"]
    names = [name for name in files if parts is None or name.partition("/")[0] in parts]

    listed = storage.list_objects(folder) if storage.is_remote(folder) else None

    def look(name: str) -> str | None:
        size, wanted = files[name]
        try:
            if listed is not None and name not in listed:
                return "is missing"
            if name == STEP_METADATA and not size:
                return _judge_parts(folder / name, names=files)
            found = listed[name].size if listed is not None else (folder / name).stat().st_size
            if level == "full" and found == size:
                known = listed[name].md5 if listed is not None and checksum == _MD5 else None
                same = (known or _measure(folder / name, checksum=checksum)[1]) == wanted
                return None if same else f"its {checksum} is another: bytes were changed"
            return None if found == size else f"has {found:,} bytes, and {size:,} were written"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return _unreadable(folder / name, error)
        except (AttributeError, TypeError, ValueError):
            return "is not what was written"

    problems = [f"{name}: {problem}" for name, problem in zip(names, _over_files(look, names), strict=True) if problem]
    if problems and not folder.is_dir():
        raise FileNotFoundError(folder)
    return problems


def _judge_parts(path: Path, *, names: Iterable[str]) -> str | None:
    """Return the problem of Orbax's list of a step's parts, if the manifest has size 0 for it. An earlier version wrote
    that while Orbax could still change the file, so its checksum may not match.
    """
    listed = json.loads(path.read_text(encoding="utf-8")).get("item_handlers") or {}
    missing = {name.partition("/")[0] for name in names if "/" in name}.difference(listed)
    return f"does not list {', '.join(sorted(missing))}" if missing else None


def say_damage(problems: Sequence[str]) -> str:
    """The first problem, and the number of others."""
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    return problems[0] + more


def quarantine(folder: Path, problems: Sequence[str]) -> Path:
    """Move a damaged step to quarantine, with its problems in a text file next to it; returns its new path."""
    shelf = folder.parent.parent / QUARANTINE
    if not storage.is_remote(shelf):
        shelf.mkdir(exist_ok=True)
    place, number = shelf / folder.name, 1
    while place.exists():
        number += 1
        place = shelf / f"{folder.name}-{number}"
    place.with_name(place.name + ".txt").write_text("\n".join([f"{folder}", *problems, ""]), encoding="utf-8")
    if storage.is_remote(folder):
        objects.quarantine(folder, place)
    else:
        os.rename(folder, place)
    return place


def quarantined(run_dir: Path) -> dict[str, list[str]]:
    """The steps in quarantine, by their folders' names, with the problems of each."""
    found = {}
    for path in sorted((run_dir / QUARANTINE).glob("*")):
        if path.is_dir():
            try:
                found[path.name] = path.with_name(path.name + ".txt").read_text(encoding="utf-8").splitlines()[1:]
            except OSError:
                found[path.name] = ["the reason is not there any more"]
    return found


def discard(folder: Path) -> None:
    """Remove a step: it is first renamed into the trash, so that a kill leaves it complete or gone."""
    if storage.is_remote(folder):
        objects.discard(folder)
        return
    trash = folder.parent / TRASH
    trash.mkdir(exist_ok=True)
    place = trash / f"{folder.name}.{os.getpid()}.{time.monotonic_ns()}"
    os.rename(folder, place)
    shutil.rmtree(place, ignore_errors=True)


def empty_trash(directory: Path) -> None:
    """Empty the trash of a folder of steps, including steps from a process that was killed since."""
    if not storage.is_remote(directory):
        shutil.rmtree(directory / TRASH, ignore_errors=True)


def remove_half_written(run_dir: Path) -> None:
    """Remove the folders of a failed save, repeatedly, until none has reappeared for a second (at most ten seconds).

    TensorStore's threads may still write other arrays of it, and recreate a removed folder.
    """
    if storage.is_remote(run_dir):
        for kind in (CHECKPOINTS, MILESTONES):
            objects.quietly(lambda kind=kind: objects.sweep(run_dir / kind), what="removing a failed save")
        return
    until, quiet_since = time.monotonic() + 10, time.monotonic()
    while time.monotonic() < min(until, quiet_since + 1):
        for path in run_dir.glob("*/*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
            quiet_since = time.monotonic()
        time.sleep(0.05)


def list_steps(run_dir: Path, kind: str) -> list[Path]:
    """The finished steps of a run in `checkpoints` or `milestones`, oldest first."""
    if storage.is_remote(run_dir):
        return [run_dir / kind / str(step) for step in objects.list_steps(run_dir / kind)]
    with suppress(FileNotFoundError), os.scandir(run_dir / kind) as entries:
        # A finished step is renamed into place.
        names = [entry.name for entry in entries if re.fullmatch("[0-9]+", entry.name) and entry.is_dir()]
        return [run_dir / kind / name for name in sorted(names, key=int)]
    return []


def measure_size(step: Path) -> int:
    """Total bytes of all files of a step; 0 if a running run has just removed it."""
    if storage.is_remote(step):
        return sum(entry.size for entry in storage.list_objects(step).values())
    with suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
    return 0


def written_at(step: Path) -> float:
    """Time at which a step was finished, in seconds since 1970."""
    return (step / COMMITTED).stat().mtime if storage.is_remote(step) else step.stat().st_mtime


def _measure(path: Path, *, checksum: str = "", sync: bool = False) -> list[Any]:
    """[bytes, checksum as hexadecimal digits]."""
    if storage.is_remote(path) or checksum == _MD5:
        return _read_through(path, checksum=checksum or _MD5)
    crc, size = 0, 0
    with open(path, "rb", buffering=0) as file:
        block = memoryview(bytearray(min(_BLOCK, os.fstat(file.fileno()).st_size) or 1))
        while count := file.readinto(block):
            crc, size = zlib.crc32(block[:count], crc), size + count
        if sync:
            os.fsync(file.fileno())
    return [size, f"{crc:08x}"]


def _read_through(path: Path, *, checksum: str) -> list[Any]:
    """As `_measure`, for files that were copied between a disk and an object store, with either checksum."""
    md5, crc, size = hashlib.md5(usedforsecurity=False), 0, 0
    blocks = storage.read_blocks(path) if storage.is_remote(path) else iter([path.read_bytes()])
    for block in blocks:
        size += len(block)
        if checksum == _MD5:
            md5.update(block)
        else:
            crc = zlib.crc32(block, crc)
    return [size, md5.hexdigest() if checksum == _MD5 else f"{crc:08x}"]


def _own_checksum(files: dict[str, list[Any]]) -> str:
    return f"{zlib.crc32(json.dumps(files, sort_keys=True).encode()):08x}"


def _names(folder: Path) -> Iterator[str]:
    """The files below a folder, by their relative paths."""
    for root, _, names in os.walk(folder):
        yield from (os.path.relpath(os.path.join(root, name), folder).replace(os.sep, "/") for name in names)


def _over_files(function: Any, names: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="checksums") as threads:
        return list(threads.map(function, names))


def _unreadable(path: Path, error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return f"cannot be read: {error.strerror}"
