"""Parquet by row groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ctllm_jax.config.errors import UserError
from ctllm_jax.dataset.text import checked_value
from data_prep.readers.fields import TEXT_FIELDS, as_label
from data_prep.readers.files import open_file
from data_prep.readers.unit import InputUnit, Quarantine, Tally, check_size
from data_prep.records import Record

_BATCH_ROWS = 256
_FEWEST_ROWS = 8
_BATCH_BYTES = 2**28


class Layout(NamedTuple):
    """A Parquet file's footer: names of its columns, those that may be its text, and (rows, uncompressed bytes, stored
    bytes) of each row group."""

    columns: list[str]
    candidates: list[str]
    groups: list[tuple[int, int, int]]


def _pyarrow(file: str):
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} needs the package pyarrow: pip install 'ctllm-jax[prep]'") from None
    return pyarrow


def layout(file: str) -> Layout | None:
    """What the footer says, or None where it is damaged."""
    pyarrow = _pyarrow(file)
    with open_file(file) as raw:
        try:
            with pyarrow.parquet.ParquetFile(raw) as table:
                groups = [table.metadata.row_group(index) for index in range(table.metadata.num_row_groups)]
                stored = [sum(group.column(index).total_compressed_size for index in range(group.num_columns))
                          for group in groups]
                fields = {field.name: field.type for field in table.schema_arrow}
                return Layout(list(fields), [name for name in TEXT_FIELDS if _is_text(pyarrow, fields.get(name))],
                              [(group.num_rows, group.total_byte_size, size)
                               for group, size in zip(groups, stored, strict=True)])
        except (pyarrow.ArrowException, OSError) as error:
            _raise_unless_damage(pyarrow, error)
            return None


def _raise_unless_damage(pyarrow, error: Exception) -> None:
    """Raise again what is no fault of the data: a connection that broke, a disk that cannot be read.

    pyarrow tells of damaged data by its own exceptions and by plain OSErrors without a number.
    """
    if not isinstance(error, pyarrow.ArrowException) and (type(error) is not OSError or error.errno is not None):
        raise error


def _is_text(pyarrow, kind) -> bool:
    types = pyarrow.types
    if kind is not None and types.is_dictionary(kind):
        kind = kind.value_type
    return kind is not None and (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
                                 or types.is_binary(kind) or types.is_large_binary(kind))


def group_ranges(layout: Layout, unit_bytes: int) -> list[tuple[int, int, int, int]]:
    """Row groups put together up to at least `unit_bytes`: (first group, group after the last, first row, bytes)."""
    ranges, start, first, row, size, stored = [], 0, 1, 1, 0, 0
    for index, (rows, expanded, on_disk) in enumerate(layout.groups):
        row, size, stored = row + rows, size + expanded, stored + on_disk
        if size >= unit_bytes or index == len(layout.groups) - 1:
            ranges.append((start, index + 1, first, stored))
            start, first, size, stored = index + 1, row, 0, 0
    return ranges


def read_parquet(unit: InputUnit, largest: int, quarantine: Quarantine, tally: Tally) -> Iterator[Record]:
    """The rows of some row groups. A bad value, or one of more than `largest` bytes, costs its row; a damaged page, the
    rest of its row group."""
    file = unit["file"]
    pyarrow = _pyarrow(file)
    row = unit["first"]
    with open_file(file) as raw:
        try:
            table = pyarrow.parquet.ParquetFile(raw, buffer_size=2**20)
        except (pyarrow.ArrowException, OSError) as error:
            _raise_unless_damage(pyarrow, error)
            quarantine.put(file, row, f"the Parquet file is damaged: {error}")
            return
        names = table.schema_arrow.names
        text_field = unit["text_field"]
        if text_field.split(".")[0] not in names and text_field not in names:
            known = ", ".join(map(repr, names[:8]))
            quarantine.put(file, row, f"no column {text_field!r}; its columns are {known}")
            return
        dictionaries = pyarrow.parquet.ParquetFile(raw, metadata=table.metadata, read_dictionary=[text_field])
        stop = table.metadata.num_row_groups if unit["stop"] is None else unit["stop"]
        for group in range(unit["start"] or 0, stop):
            after = row + table.metadata.row_group(group).num_rows
            try:
                rows = _rows_at_once(pyarrow, dictionaries, group, text_field)
                for record in _read_group(pyarrow, table, group, row, rows, unit, largest, quarantine, tally):
                    row = (record if isinstance(record, int) else record.position) + 1
                    if not isinstance(record, int):
                        yield record
            except (pyarrow.ArrowException, OSError) as error:
                _raise_unless_damage(pyarrow, error)
                quarantine.put(file, row, f"row group {group} is damaged, rows {row:,} to {after - 1:,} are lost: "
                                          f"{error}")
            row = after


def _rows_at_once(pyarrow, dictionaries, group: int, field: str) -> int:
    """Rows of a batch of the row group, so that it has 256 MiB at most if each row repeats the longest value of the
    column's dictionary: a file of some kilobytes may stand for terabytes."""
    for batch in dictionaries.iter_batches(batch_size=1, row_groups=[group], columns=[field]):
        if not pyarrow.types.is_dictionary(batch.column(0).type):
            return _FEWEST_ROWS  # A field within another.
        values = batch.column(0).dictionary
        longest = pyarrow.compute.max(pyarrow.compute.binary_length(values)).as_py() if len(values) else 0
        return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, longest or 0)))
    return _BATCH_ROWS


def _read_group(pyarrow, table, group: int, row: int, rows: int, unit: InputUnit, largest: int, quarantine: Quarantine,
                tally: Tally) -> Iterator[Record | int]:
    """Records, and the numbers of rows that were put aside."""
    file, name, source, text_field = unit["file"], unit["name"], unit["source"], unit["text_field"]
    labels = [unit["id_field"], unit["url_field"], unit["time_field"]]
    columns = list(dict.fromkeys(field for field in (text_field, *labels) if field is not None))
    for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
        texts = _values(pyarrow, batch, text_field, largest)
        ids, urls, times = (_labels(pyarrow, batch, field) for field in labels)
        for value, own, url, time in zip(texts, ids, urls, times, strict=True):
            try:
                check_size(value if isinstance(value, _Length) else 0, largest, "the value")
                text = checked_value(value.decode("utf-8") if isinstance(value, bytes) else value, text_field)
            except ValueError as error:
                reason = "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
                quarantine.put(file, row, reason, value if isinstance(value, bytes) else b"")
                yield row
            else:
                tally.encodings["utf-8"] += 1
                yield Record(own or f"{name}#{row}", url, text, source, time, file, row)
            row += 1


def _labels(pyarrow, batch, field: str | None) -> list[str | None]:
    if field is None:
        return [None] * batch.num_rows
    return [None if isinstance(value, _Length) else as_label(value) for value in _values(pyarrow, batch, field)]


class _Length(int):
    """Bytes of a text that is not held, since it is too long."""


def _values(pyarrow, batch, field: str, largest: int = 2**16) -> list:
    """A column as Python values: text as undecoded bytes, so that one bad value costs one row; dates as text. For text
    of more than `largest` bytes there is its length alone."""
    types = pyarrow.types
    if field in batch.schema.names:
        column = batch.column(field)
    else:
        top, _, rest = field.partition(".")
        column = batch.column(top)
        for part in rest.split("."):
            if not types.is_struct(column.type) or column.type.get_field_index(part) < 0:
                return [None] * batch.num_rows
            column = pyarrow.compute.struct_field(column, part)
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_string_view(column.type):
        column = column.cast(pyarrow.large_string())
    if (types.is_string(column.type) or types.is_large_string(column.type) or types.is_binary(column.type)
            or types.is_large_binary(column.type)):
        sizes = pyarrow.compute.binary_length(column).to_pylist()
        held = [None if (size or 0) > largest else place for place, size in enumerate(sizes)]
        values = column.take(pyarrow.array(held, pyarrow.int64())).cast(pyarrow.large_binary()).to_pylist()
        return [_Length(size) if place is None else value
                for place, size, value in zip(held, sizes, values, strict=True)]
    elif types.is_temporal(column.type):
        column = column.cast(pyarrow.string())
    return column.to_pylist()
