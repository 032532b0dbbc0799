"""Work units that are done exactly once: files appear complete, and a record that is written last confirms them.

A stage is a folder `parts/` of files and a folder `commits/` of records, one a unit. A record holds the hash of all
that decides the unit's bytes (its key), the names and sizes of its files, and its counters. What is to do is the plan
minus the records whose key is the wanted one; a reader opens only files that a valid record names. So a run killed
anywhere goes on, a changed option runs its stage and what follows again, and two workers on one unit do no harm: they
write the same bytes, each under a name of its own until the rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctllm_jax.dataset.staging import flush

Unit = dict[str, Any]
"""JSON values; `id` names it (a file name), and everything in it decides its bytes, apart from `location`."""


def fingerprint(*values: Any) -> str:
    """Hash of JSON values, 32 hexadecimal digits."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class Commit:
    """The result of a finished unit: `files` are names below the stage's `parts`, with their sizes in bytes."""

    unit: str
    key: str
    files: dict[str, int]
    counters: dict[str, Any]


@dataclass
class Output:
    """Where a running unit writes. `file(name)` gives the path to write; `counters` go into the record."""

    parts: Path
    prefix: str
    counters: dict[str, Any] = field(default_factory=dict)
    _names: dict[str, Path] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        """A temporary path for the file that will be `parts/name`; `name` may have a folder in front."""
        path = self.parts / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._names[name] = path.with_name(f".{path.name}.{self.prefix}")
        return self._names[name]


@dataclass(frozen=True)
class Stage:
    """A stage's folder. `options` is the fingerprint of everything except the unit that determines the unit's bytes.

    `parts` is the folder of its files, by default `root/parts`.
    """

    root: Path
    options: str
    parts: Path

    def key(self, unit: Unit) -> str:
        """The key that a valid record of this unit has."""
        return fingerprint(self.options, {name: value for name, value in unit.items() if name != "location"})

    def find(self, unit: Unit) -> Commit | None:
        """The valid record of a unit whose files are all there, or None."""
        try:
            values = json.loads(self._record(unit).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:  # Not ours: a record appears whole.
            return None
        if values.get("key") != self.key(unit):
            return None
        commit = Commit(**values)
        for name, size in commit.files.items():
            try:
                if os.stat(self.parts / name).st_size != size:
                    return None
            except FileNotFoundError:
                return None
        return commit

    @contextmanager
    def commit(self, unit: Unit) -> Iterator[Output]:
        """Run a unit: files written through the Output appear if the block succeeds, and none otherwise."""
        output = Output(self.parts, f"{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
        record = self._record(unit)
        try:
            yield output
            names, key = output._names, self.key(unit)
            for path in names.values():
                flush(path)
            if self._is_of_another(record, key):
                # A record with other options must not remain next to these files.
                record.unlink(missing_ok=True)
                flush(record.parent)
            sizes = {name: path.stat().st_size for name, path in names.items()}
            for name, path in names.items():
                path.replace(self.parts / name)
            for folder in {(self.parts / name).parent for name in names}:
                flush(folder)
            write_atomically(record, json.dumps({"unit": unit["id"], "key": key, "files": sizes,
                                                 "counters": output.counters}, ensure_ascii=False))
        finally:
            for path in output._names.values():
                path.unlink(missing_ok=True)

    def clean(self, units: Sequence[Unit]) -> None:
        """Remove files that belong to no unit of the plan: those of former plans, and temporary files of killed
        workers.

        Call it when every unit is committed and nobody else writes.
        """
        wanted = {self._record(unit).name for unit in units}
        files = set()
        for unit in units:
            commit = self.find(unit)
            files.update(commit.files if commit else ())
        for record in self._records():
            if record.name not in wanted:
                record.unlink()
        for path in sorted(self.parts.rglob("*"), reverse=True) if self.parts.exists() else ():
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.parts).as_posix() not in files:
                path.unlink()

    def remove(self) -> None:
        """Remove the stage and its files."""
        for folder in (self.root, self.parts):
            shutil.rmtree(folder, ignore_errors=True)

    def _record(self, unit: Unit) -> Path:
        return self.root / "commits" / f"{unit['id']}.json"

    def _records(self) -> list[Path]:
        folder = self.root / "commits"
        return sorted(folder.iterdir()) if folder.exists() else []

    @staticmethod
    def _is_of_another(record: Path, key: str) -> bool:
        try:
            return json.loads(record.read_bytes()).get("key") != key
        except FileNotFoundError:
            return False
        except ValueError:
            return True


def open_stage(root: Path, *options: Any, parts: Path | None = None) -> Stage:
    """Open the stage in `root`, made if missing; its units and `options` determine the bytes of its files."""
    (root / "commits").mkdir(parents=True, exist_ok=True)
    stage = Stage(root, fingerprint(*options), parts or root / "parts")
    stage.parts.mkdir(parents=True, exist_ok=True)
    return stage


def write_atomically(path: Path, text: str) -> None:
    """Write a file atomically, and flush it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
