"""Parquet: row groups are units, any column type that holds text, and damage costs a row or a row group."""

import datetime
import io

import pyarrow
import pyarrow.parquet
import pytest

from ctllm_jax.config.prepare import PrepareConfig
from data_prep.readers import parquet, read_unit


def write(path, table, rows=2, **options):
    pyarrow.parquet.write_table(table, path, row_group_size=rows, **options)


@pytest.mark.parametrize("unit_bytes", [1, 150, 10**6])
def test_row_groups_make_units_and_rows_keep_their_numbers(tmp_path, read, unit_bytes):
    write(tmp_path / "a.parquet", pyarrow.table({"text": [f"text {index}" for index in range(9)]}))
    reading = read([tmp_path], unit_bytes=unit_bytes)
    assert [(record.text, record.position) for record in reading.records] == [
        (f"text {index}", index + 1) for index in range(9)]
    assert len(reading.units) == {1: 5, 10**6: 1}.get(unit_bytes, len(reading.units))
    assert 1 <= len(reading.units) <= 5


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary(),
                                  pyarrow.dictionary(pyarrow.int32(), pyarrow.string())], ids=str)
def test_text_comes_in_any_column_type(tmp_path, read, kind):
    column = pyarrow.array(["一", "two", "一"]).cast(kind)
    write(tmp_path / "a.parquet", pyarrow.table({"content": column}))
    assert read([tmp_path]).texts == ["一", "two", "一"]


def test_labels_of_other_types_become_text(tmp_path, read):
    write(tmp_path / "a.parquet", pyarrow.table({
        "text": ["a", "b"], "id": [1, 2], "url": [b"http://a/\xff", None],
        "date": pyarrow.array([datetime.datetime(2026, 1, 2), None], pyarrow.timestamp("ns"))}))
    first, second = read([tmp_path]).records
    assert (first.id, first.url, first.time) == ("1", "http://a/\ufffd", "2026-01-02 00:00:00.000000000")
    assert (second.id, second.url, second.time) == ("2", None, None)


def test_a_bad_value_costs_its_row(tmp_path, read):
    bad = pyarrow.array([b"one", b"\xff\xfe", None, "四".encode(), b"five"]).view(pyarrow.string())
    write(tmp_path / "a.parquet", pyarrow.table({"text": bad}), rows=3)
    reading = read([tmp_path])
    assert [(record.text, record.position) for record in reading.records] == [("one", 1), ("四", 4), ("five", 5)]
    assert [(entry.position, entry.reason, entry.raw) for entry in reading.bad] == [
        (2, "invalid UTF-8", b"\xff\xfe"), (3, "field 'text' is not text but NoneType", b"")]


def test_a_column_that_is_no_text_is_put_aside_row_by_row(tmp_path, read):
    write(tmp_path / "a.parquet", pyarrow.table({"text": [1, 2]}))
    reading = read([tmp_path], text_field="text")
    assert [entry.reason for entry in reading.bad] == ["field 'text' is not text but int"] * 2


def test_a_missing_column_is_named_once(tmp_path, read):
    write(tmp_path / "a.parquet", pyarrow.table({"text": ["a"]}))
    write(tmp_path / "b.parquet", pyarrow.table({"headline": ["b"], "n": [1]}))
    reading = read([tmp_path])
    assert reading.texts == ["a"]
    assert [entry.reason for entry in reading.bad] == ["no column 'text'; its columns are 'headline', 'n'"]


@pytest.mark.parametrize("harm", [lambda data: data[:-10], lambda data: data[:len(data) // 2], lambda data: data[:6]])
def test_a_cut_file_is_put_aside(tmp_path, read, harm):
    write(tmp_path / "a.parquet", pyarrow.table({"text": ["一"] * 9}))
    (tmp_path / "a.parquet").write_bytes(harm((tmp_path / "a.parquet").read_bytes()))
    write(tmp_path / "b.parquet", pyarrow.table({"text": ["whole"]}))
    reading = read([tmp_path])
    assert reading.texts == ["whole"]
    (bad,) = reading.bad
    assert bad.position == 1 and "the Parquet file is damaged" in bad.reason


def test_a_damaged_page_costs_its_row_group(tmp_path, read):
    path = tmp_path / "a.parquet"
    texts = [f"{index:03d}" + "x" * 200 for index in range(9)]
    write(path, pyarrow.table({"text": texts}), rows=3, use_dictionary=False, write_page_checksum=False)
    data = bytearray(path.read_bytes())
    group = pyarrow.parquet.read_metadata(path).row_group(1).column(0)
    start = group.data_page_offset
    data[start:start + group.total_compressed_size] = b"\xff" * group.total_compressed_size
    path.write_bytes(data)
    reading = read([path])
    assert reading.texts == texts[:3] + texts[6:]
    assert [record.position for record in reading.records] == [1, 2, 3, 7, 8, 9]
    (bad,) = reading.bad
    assert bad.position == 4 and "row group 1 is damaged, rows 4 to 6 are lost" in bad.reason


def test_a_connection_that_breaks_is_no_damage(tmp_path, read, monkeypatch):
    write(tmp_path / "a.parquet", pyarrow.table({"text": ["x" * 1000] * 9}), rows=3, compression=None)
    (unit,) = read([tmp_path]).units

    class Breaking(io.FileIO):
        def read(self, size=-1):
            if 0 < self.tell() < 1000:
                raise ConnectionResetError("gone")
            return super().read(size)

    monkeypatch.setattr(parquet, "open_file", Breaking)
    with pytest.raises(ConnectionResetError):
        list(read_unit(unit, PrepareConfig(input=["x"], output="x"), None))


def test_a_value_that_is_too_long_costs_its_row(tmp_path, read):
    long = "长" * (2**20 // 3 + 1)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", long, "three"], "id": ["a", "b", long]}), path)
    reading = read([path], max_record_mib=1)
    assert [(record.text, record.id) for record in reading.records] == [("one", "a"), ("three", "a.parquet#3")]
    assert [(bad.position, bad.reason) for bad in reading.bad] == [
        (2, "the value has more than 1 MiB, the largest record that max_record_mib allows")]


def test_few_rows_are_read_at_once_where_a_dictionary_has_long_values(tmp_path, read, monkeypatch):
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 4000)
    seen, values = [], parquet._values
    monkeypatch.setattr(parquet, "_values", lambda module, batch, *more: seen.append(batch.num_rows) or values(
        module, batch, *more))
    table = pyarrow.table({"text": ["x" * 900] * 10 + ["y"] * 10})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    assert read([tmp_path]).texts == ["x" * 900] * 10 + ["y"] * 10
    assert seen[-4:] == [4, 4, 2, 10]  # After what the sample of the plan has read.
