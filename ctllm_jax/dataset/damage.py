"""Records of a dataset that cannot be read, over all processes of a run, and the limit on their number."""

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
    """A shard differs from the manifest, or a record of it cannot be read."""


class DamageLog:
    """The damaged records of a run, stored in a folder of its directory; can be pickled, and shared by threads.

    Each reading process, including loader processes, appends to its own file; the union of all files counts, by shard
    and record. The folder is kept across attempts: remove it after you repair the data.

    Args:
      folder: made for the first damaged record.
      budget: number of damaged records that the run tolerates.
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
        """Record a damaged record. Raises DamagedShard if the budget is exceeded."""
        entry = {"shard": str(path), "record": record, "replaced_by": replaced_by, "why": why}
        with self._lock:
            name, line = f"{socket.gethostname()}-{os.getpid()}", json.dumps(entry) + "\n"
            if is_remote(self.folder):
                with told(self.folder):  # an object store cannot append
                    (self.folder / f"{name}-{time.monotonic_ns()}.jsonl").write_text(line, encoding="utf-8")
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(self.folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
                    file.write(line)
            count = len(self.read())
        if count > self.budget:
            raise DamagedShard(f"{path}: record {record} cannot be read ({why}): {count} damaged records in this run,"
                               f" more than data.damaged_budget={self.budget}: `launch.py data verify {path.parent}`"
                               f" names all of them; {self.folder} lists those that this run found")

    def poll(self) -> list[dict[str, Any]]:
        """As `read`, for polling: on an object store it looks once per half minute, and never fails."""
        if not is_remote(self.folder):
            return self.read()
        now = time.monotonic()
        if self._looked is None or now - self._looked > _REMOTE_SECONDS:
            self._looked = now
            try:
                with told(self.folder):
                    self._known = self.read()
            except OSError as error:
                log.warning("%s; retrying", error)
        return self._known

    def read(self) -> list[dict[str, Any]]:
        """All damaged records that were found, each once, by shard and record."""
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for path in sorted(self.folder.glob("*.jsonl")) if self.folder.is_dir() else ():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # another process is writing it
                    continue
                found.setdefault((entry["shard"], entry["record"]), entry)
        return [found[key] for key in sorted(found)]
