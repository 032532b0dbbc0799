"""A unit to its records."""

from __future__ import annotations

from collections.abc import Iterator

from ctllm_jax.config.prepare import PrepareConfig
from data_prep.readers.lines import read_lines, read_text
from data_prep.readers.parquet import read_parquet
from data_prep.readers.unit import NUL, InputUnit, Quarantine, Tally
from data_prep.records import Record

_SAMPLE_TRIES = 20
_SAMPLE_CHARACTERS = 200


def read_unit(unit: InputUnit, config: PrepareConfig, quarantine: Quarantine, tally: Tally | None = None
              ) -> Iterator[Record]:
    """The records of a unit, in order; what is bad goes to `quarantine`, and counts go to `tally` if one is given.

    Bad data raises nothing here. OSError where the file cannot be opened; UserError where a package is missing.
    """
    tally = Tally() if tally is None else tally
    for record in _records(unit, config, quarantine, tally):
        if nuls := record.text.count("\0"):
            tally.left_out[NUL] += nuls
            record = record._replace(text=record.text.replace("\0", ""))
        yield record


def _records(unit: InputUnit, config: PrepareConfig, quarantine: Quarantine, tally: Tally) -> Iterator[Record]:
    largest = config.max_record_mib << 20
    if unit["kind"] == "jsonl":
        return read_lines(unit, largest, quarantine, tally)
    if unit["kind"] == "parquet":
        return read_parquet(unit, largest, quarantine, tally)
    if unit["kind"] == "text":
        return read_text(unit, largest, quarantine, tally)
    from data_prep.readers.web import read_warc

    return read_warc(unit, config.html, largest, config.record_seconds, quarantine, tally)


class _NoSample(Exception):
    """The first records are all bad."""


class _Impatient:
    """A quarantine that gives up after some records."""

    def __init__(self):
        self._left = _SAMPLE_TRIES

    def put(self, file: str, position: int, reason: str, raw: bytes = b"") -> None:
        self._left -= 1
        if not self._left:
            raise _NoSample


def sample_of(unit: InputUnit, config: PrepareConfig) -> dict | None:
    """The first record of a unit, its text cut short: id, url, time, text; None where there is none to be shown."""
    try:
        record = next(read_unit(unit, config, _Impatient()), None)
    except _NoSample:
        return None
    return record and {"id": record.id, "url": record.url, "time": record.time,
                       "text": record.text[:_SAMPLE_CHARACTERS]}
