"""Records of a dataset that cannot be read: who met which, over all processes of a run, and how many are too many."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from ctllm_jax.config.errors import UserError
from ctllm_jax.storage import is_remote, told

log = logging.getLogger(__name__)
_REMOTE_SECONDS = 30.0


class DamagedShard(UserError):
    """A shard is not what the manifest says, or a record of it cannot be read."""


class DamageLog:
    """The damaged records of a run, in a folder of its directory; may be pickled, and shared by threads.

    Each process that reads, loader processes included, appends to a file of its own; what counts is the union of all,
    by shard and record. It stays from one attempt to the next: remove the folder when the data was repaired.

    Args:
      folder: made when the first damaged record is met.
      budget: how many the run may meet.
    """

    def __init__(self, folder: Path, *, budget: int):
        self.folder, self.budget = folder, budget
        self._lock = threading.Lock()
        self._looked: float | None = None
        self._known: list[dict[str, Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def note(self, path: Path, record: int, *, replaced_by: int, why: str) -> None:
        """Note a damaged record. DamagedShard where it is one too many."""
        entry = {"shard": str(path), "record": record, "replaced_by": replaced_by, "why": why}
        with self._lock:
            name, line = f"{socket.gethostname()}-{os.getpid()}", json.dumps(entry) + "\n"
            if is_remote(self.folder):
                with told(self.folder):  # nothing is appended to there
                    (self.folder / f"{name}-{time.monotonic_ns()}.jsonl").write_text(line, encoding="utf-8")
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(self.folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
                    file.write(line)
            count = len(self.read())
        if count > self.budget:
            raise DamagedShard(f"{path}: record {record} cannot be read ({why}): with it {count} of this run cannot,"
                               f" more than data.damaged_budget={self.budget}: `launch.py data verify {path.parent}`"
                               f" names all there are; {self.folder} has those that were met")

    def poll(self) -> list[dict[str, Any]]:
        """As `read`, to be asked again and again: on an object store it looks every half a minute, and never fails."""
        if not is_remote(self.folder):
            return self.read()
        now = time.monotonic()
        if self._looked is None or now - self._looked > _REMOTE_SECONDS:
            self._looked = now
            try:
                with told(self.folder):
                    self._known = self.read()
            except OSError as error:
                log.warning("%s; it is looked at again", error)
        return self._known

    def read(self) -> list[dict[str, Any]]:
        """All that were met, each once, by shard and record."""
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for path in sorted(self.folder.glob("*.jsonl")) if self.folder.is_dir() else ():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # another process is just writing it
                    continue
                found.setdefault((entry["shard"], entry["record"]), entry)
        return [found[key] for key in sorted(found)]
