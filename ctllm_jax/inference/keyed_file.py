"""JSON lines that are made a row at a time, and gone on with after any interruption. No jax here.

Rows are appended; what a kill or a full disk left of a last line is cut off at the next start.
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
"""What a power cut may cost; a killed process costs nothing that was appended."""
logger = logging.getLogger(__name__)


class KeyedFile:
    """Rows by their `key`, a hash of all that decides the rest of the row; open for one process.

    A row that was made under other settings has another key, and stays: whoever takes the old settings back finds it.

    Attributes:
      rows: the rows by key.

    Raises:
      UserError: a file that this class did not write; another process at work.
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
    """Write a record as one line to the end of an unbuffered file. UserError where there is no room."""
    data = memoryview(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    try:
        while data:
            data = data[file.write(data):]
    except OSError as error:
        raise UserError(f"{file.name} cannot be written: {error.strerror}; the same command goes on when there is "
                        "room") from None


def lock(file: Any, name: str) -> None:
    """Lock a file as long as it is open; where there are no locks, there is none. UserError where another has it."""
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
    """The records of a file, from which a last line that is not whole is cut off. UserError for any other line.

    A last row without its line end is whole: it gets one.
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
