"""JSON lines that are written row by row, and continued after any interruption. No jax.

Rows are appended; an incomplete last line, after a kill or on a full disk, is removed at the next start.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from ctllm_jax.config.errors import UserError

FLUSH_SECONDS = 1.0
"""Seconds of work that a power cut may lose; a killed process loses no appended row."""
logger = logging.getLogger(__name__)


class KeyedFile:
    """Rows by their `key`, a hash of everything that determines the rest of the row; open for one process.

    A row made with other settings has another key, and is kept: returning to the old settings finds it again.

    Attributes:
      rows: the rows by key.

    Raises:
      UserError: the file was not written by this class, or another process is using it.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None
        try:
            lock(self._file, str(self.path))
            for line, record in enumerate(mended(self.path), 1):
                if not isinstance(record.get("key"), str):
                    raise UserError(f"{self.path}:{line}: a row without a key: it was not written by this command")
                self.rows[record["key"]] = record
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> KeyedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._sync()
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Append a row."""
        row = {"key": key, **row}
        append(self._file, row)
        self.rows[key] = row
        if time.monotonic() - self._synced > FLUSH_SECONDS:
            self._sync()

    def _sync(self) -> None:
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def append(file: Any, record: dict[str, Any]) -> None:
    """Write a record as one line to the end of an unbuffered file. Raises UserError if there is no space."""
    data = memoryview(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    try:
        while data:
            data = data[file.write(data):]
    except OSError as error:
        raise UserError(f"{file.name} cannot be written: {error.strerror}; the same command goes on when there is "
                        "room") from None


def lock(file: Any, name: str) -> None:
    """Lock a file while it is open; without lock support there is no lock. Raises UserError if another process holds
    it."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{name}: another process is making it") from None
    except OSError as error:
        logger.info("%s cannot be locked: %s", file.name, error)


def mended(path: Path) -> list[dict[str, Any]]:
    """Read the records of a file, and remove an incomplete last line. Raises UserError for any other bad line.

    A last row without a line end is complete, and gets one.
    """
    records: list[dict[str, Any]] = []
    good = 0
    torn: int | None = None
    ended = True
    with open(path, "rb") as file:
        for line, data in enumerate(file, 1):
            if torn is not None:
                raise UserError(f"{path}:{torn}: not a row of this command: it was changed since it was written")
            try:
                record = json.loads(data)
            except ValueError:
                record = None
            if isinstance(record, dict):
                records.append(record)
                good += len(data)
                ended = data.endswith(b"\n")
            else:
                torn = line
    if torn is not None:
        logger.warning("%s:%d: the last line is not whole, and is cut off", path, torn)
        os.truncate(path, good)
    elif not ended:
        with open(path, "ab") as file:
            file.write(b"\n")
    return records
