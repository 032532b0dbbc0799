"""Input files to parts of records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctllm_jax.config.errors import UserError
from data_prep.commits import Output, Unit
from data_prep.readers import Tally, read_unit
from data_prep.records import Record, schema
from data_prep.stages.common import config_of, run_unit, write_part

VERSION = 2
PART_BYTES = 8 * 2**20
"""Text of a part: small enough for many workers to share a file, large enough that a unit's fixed costs vanish."""
_SHOWN_BYTES = 2000


def run(unit: Unit, options: dict[str, Any]) -> dict[str, Any]:
    """Read `unit["location"]`, an InputUnit; at most `unit["limit"]` records where one is given."""
    return run_unit(unit, options, _read)


def _read(unit: Unit, options: dict[str, Any], output: Output) -> None:
    quarantine = _Quarantine(output, f"{unit['id']}.quarantine.jsonl")
    tally, records, size = Tally(), 0, 0
    batch: list[Record] = []
    parts = held = 0
    limit = unit.get("limit")
    try:
        for record in read_unit(unit["location"], config_of(options), quarantine, tally):
            batch.append(record)
            length = len(record.text.encode("utf-8"))
            records, size, held = records + 1, size + length, held + length
            if held >= PART_BYTES:
                _write(output.file(_part_name(unit, parts)), batch)
                batch, held, parts = [], 0, parts + 1
            if records == limit:
                break
    except OSError as error:
        raise UserError(f"{unit['location']['file']} cannot be read: {error}") from error
    finally:
        quarantine.close()
    if batch:
        _write(output.file(_part_name(unit, parts)), batch)
    output.counters |= {"records": records, "bytes": size, "quarantined": quarantine.count,
                        "first_bad": quarantine.first, "encodings": dict(tally.encodings),
                        "left_out": dict(tally.left_out)}


def _part_name(unit: Unit, index: int) -> str:
    return f"{unit['id']}-{index:05d}.parquet"


def _write(path: Path, batch: list[Record]) -> None:
    columns = {name: [getattr(record, name) for record in batch] for name in Record._fields}
    write_part(path, columns, schema())


class _Quarantine:
    """Bad records of a unit, {file, position, reason, raw} a line; the file is made by the first."""

    def __init__(self, output: Output, name: str):
        self._output, self._name, self._file = output, name, None
        self.count = 0
        self.first: str | None = None

    def put(self, file: str, position: int, reason: str, raw: bytes = b"") -> None:
        if self._file is None:
            self._file = open(self._output.file(self._name), "w", encoding="utf-8")
            self.first = f"{file}:{position}: {reason}"
        self.count += 1
        entry = {"file": file, "position": position, "reason": reason,
                 "raw": raw[:_SHOWN_BYTES].decode("utf-8", errors="backslashreplace")}
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
