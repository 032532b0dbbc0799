"""Reading as the pipeline does it: plan, then every unit, with what was put aside."""

import json
from typing import NamedTuple

import pytest

from ctllm_jax.config.prepare import PrepareConfig, SourceInput
from data_prep.readers import Tally, plan_files, read_unit


class Bad(NamedTuple):
    """What was put aside."""

    file: str
    position: int
    reason: str
    raw: bytes = b""


class Basket(list):
    """A quarantine that keeps everything."""

    def put(self, *entry):
        self.append(Bad(*entry))


class Reading(NamedTuple):
    units: list
    records: list
    bad: list
    tally: Tally

    @property
    def texts(self):
        return [record.text for record in self.records]


def read_all(inputs, *, unit_bytes=2**26, text_field=None, **options):
    """Everything that some inputs hold. `options` are prepare's."""
    inputs = [str(path) for path in inputs]
    config = PrepareConfig(input=inputs, output="unused", **options)
    units = plan_files("web", SourceInput(input=inputs, text_field=text_field), config, unit_bytes=unit_bytes)
    # A unit goes through JSON on its way to a worker.
    assert json.loads(json.dumps(units)) == units
    bad, tally = Basket(), Tally()
    records = [record for unit in units for record in read_unit(unit, config, bad, tally)]
    return Reading(units, records, bad, tally)


@pytest.fixture(scope="session")
def read():
    return read_all


@pytest.fixture(scope="session")
def as_lines():
    """JSON lines as bytes, of texts or whole records."""
    def write(*records, field="text", encoding="utf-8"):
        values = [record if isinstance(record, dict) else {field: record} for record in records]
        return b"".join(json.dumps(value, ensure_ascii=False).encode(encoding) + b"\n" for value in values)

    return write
