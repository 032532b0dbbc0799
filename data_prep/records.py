"""The record that the stages of the pipeline pass on, and its columns on disk."""

from __future__ import annotations

from typing import NamedTuple

from ctllm_jax.config.errors import UserError


class Record(NamedTuple):
    """A document and its place.

    `id` is the record's own if it has one, else `<path below the input folder>#<position>`. `file` is the path or
    URL that was read; `position` counts from 1: the line of JSON lines, the row of Parquet, the record of WET and WARC,
    1 in plain text. `time` is the record's date, unparsed.
    """

    id: str
    url: str | None
    text: str
    source: str
    time: str | None
    file: str
    position: int


def schema():
    """The pyarrow schema of records: text and url as large strings, since a part may pass 2 GiB."""
    try:
        import pyarrow
    except ImportError:
        raise UserError("records need the package pyarrow: pip install 'ctllm-jax[prep]'") from None
    text = pyarrow.large_string()
    return pyarrow.schema([
        pyarrow.field("id", pyarrow.string(), nullable=False), pyarrow.field("url", text),
        pyarrow.field("text", text, nullable=False), pyarrow.field("source", pyarrow.string(), nullable=False),
        pyarrow.field("time", pyarrow.string()), pyarrow.field("file", pyarrow.string(), nullable=False),
        pyarrow.field("position", pyarrow.int64(), nullable=False)])
