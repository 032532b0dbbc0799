"""A file of pairs that is written row by row, and continued after any interruption. No jax.

OUTPUT holds the pairs, JSON lines that `data.pairs` reads. OUTPUT.state holds, also as JSON lines, the settings and the
day on which the file was started, then the prompts that gave no pair. A key is in exactly one of the two, once. Rows
are appended; an incomplete last line, after a kill or on a full disk, is removed at the next start.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ctllm_jax.config.errors import UserError
from ctllm_jax.inference.keyed_file import FLUSH_SECONDS, append, lock, mended

_FORMAT = 1


class PairFile:
    """An output, open for one process.

    Args:
      path: the output.
      settings: everything that determines its rows, as JSON; an existing file must have the same settings.

    Attributes:
      date: ISO day on which the file was started.
      done: keys that have a pair, or never will have one.
      pairs: rows of the file.
      dropped: prompts without a pair, by reason.

    Raises:
      UserError: the settings differ (each difference is listed), the file was not written by this class, or another
        process is using it.
    """

    def __init__(self, path: Path | str, settings: dict[str, Any]):
        self.path = Path(path)
        self.state = self.path.with_name(self.path.name + ".state")
        self.done: set[str] = set()
        self.pairs = 0
        self.dropped: Counter[str] = Counter()
        settings = json.loads(json.dumps({"format": _FORMAT, **settings}))
        if self.path.exists() and not self.state.exists():
            raise UserError(f"output={self.path} is there, but not {self.state.name}, which would say how it was made: "
                            "give another output, or move the file away")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._state = open(self.state, "ab", buffering=0)
        except OSError as error:
            raise UserError(f"output={self.path} cannot be written: {error.strerror}") from None
        try:
            lock(self._state, f"output={self.path}")
            self.date = self._open(settings)
            self._rows = open(self.path, "ab", buffering=0)
        except BaseException:
            self._state.close()
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> PairFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._sync()
        self._rows.close()
        self._state.close()

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Append a pair. `row` contains the key as `provenance.key`."""
        self._append(self._rows, row)
        self.done.add(key)
        self.pairs += 1

    def drop(self, key: str, source: str, reason: str) -> None:
        """Note that a prompt gives no pair."""
        self._append(self._state, {"key": key, "source": source, "reason": reason})
        self.done.add(key)
        self.dropped[reason] += 1

    def _open(self, settings: dict[str, Any]) -> str:
        """Read the existing state, or start one; returns the day of the start."""
        if not self.path.exists():
            # Rows are written after the state, so there are none: the state belongs to a file that was removed.
            date = datetime.datetime.now(datetime.UTC).date().isoformat()
            self._state.truncate(0)
            self._append(self._state, {"settings": settings, "date": date})
            os.fsync(self._state.fileno())
            return date
        records = mended(self.state)
        try:
            kept, date = records[0]["settings"], records[0]["date"]
            for record in records[1:]:
                self.done.add(record["key"])
                self.dropped[record["reason"]] += 1
        except (IndexError, KeyError, TypeError):
            raise UserError(f"{self.state} was not written by this command") from None
        _compare(self.path, kept, settings)
        for line, record in enumerate(mended(self.path), 1):
            try:
                self.done.add(record["provenance"]["key"])
            except (KeyError, TypeError):
                raise UserError(f"{self.path}:{line}: a row without provenance.key: it was changed since it was "
                                "written") from None
            self.pairs += 1
        return date

    def _append(self, file: Any, record: dict[str, Any]) -> None:
        append(file, record)
        if file is not self._state and time.monotonic() - self._synced > FLUSH_SECONDS:
            self._sync()

    def _sync(self) -> None:
        for file in (self._state, self._rows):
            with contextlib.suppress(OSError):
                os.fsync(file.fileno())
        self._synced = time.monotonic()


def _compare(path: Path, kept: dict[str, Any], now: dict[str, Any]) -> None:
    before, after = _flat(kept), _flat(now)
    def shown(tree: dict[str, Any], name: str) -> str:
        return json.dumps(tree[name], ensure_ascii=False) if name in tree else "absent"

    differing = [f"{name}: {shown(before, name)} in the file, {shown(after, name)} now"
                 for name in sorted({*before, *after}) if shown(before, name) != shown(after, name)]
    if differing:
        raise UserError("\n  ".join([f"output={path} was begun with other settings:", *differing])
                        + "\ntake these back, or give another output")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
