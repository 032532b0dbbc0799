"""Every kind in one folder, recognised by what it holds; fields, ids and units; what is left out is said."""

import gzip
import json
import logging
import sys

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.prepare import PrepareConfig, SourceInput
from data_prep.readers import describe, plan_files
from data_prep.records import Record, schema

WET = (b"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Record-ID: <urn:uuid:1>\r\nWARC-Target-URI: http://a/1\r\n"
       b"WARC-Date: 2026-01-02T03:04:05Z\r\nContent-Length: 7\r\n\r\nwet\xe4\xb8\x80\n\r\n\r\n")


@pytest.fixture
def mixed(tmp_path, as_lines):
    """A folder with a file of each kind, two of one base name, and some that are no text."""
    (tmp_path / "b").mkdir()
    (tmp_path / "a.jsonl").write_bytes(as_lines({"id": 7, "text": "a1", "url": "http://a/7", "date": "2026-01-01"},
                                                    "a2"))
    (tmp_path / "b" / "a.jsonl").write_bytes(as_lines("b1"))
    (tmp_path / "b" / "c.jsonl.gz").write_bytes(gzip.compress(as_lines("c1", field="content")))
    (tmp_path / "b" / "d.jsonl.zst").write_bytes(zstandard.compress(as_lines("d1")))
    pyarrow.parquet.write_table(pyarrow.table({"content": ["p1", "p2"], "doc_id": ["x", None], "url": ["u", None]}),
                                tmp_path / "p.parquet")
    (tmp_path / "t.txt").write_text("t1\nt2\n")
    (tmp_path / "w.warc.wet.gz").write_bytes(gzip.compress(WET))
    (tmp_path / "part-00000").write_bytes(as_lines("s1"))
    (tmp_path / "dataset_info.json").write_text('{"features": {"a": 1}}\n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "README.md").write_text("# nothing")
    (tmp_path / "_SUCCESS").touch()
    return tmp_path


EXPECTED = [
    ("a.jsonl", "jsonl", None, ["a1", "a2"]), ("b/a.jsonl", "jsonl", None, ["b1"]),
    ("b/c.jsonl.gz", "jsonl", "gz", ["c1"]), ("b/d.jsonl.zst", "jsonl", "zst", ["d1"]),
    ("p.parquet", "parquet", None, ["p1", "p2"]), ("part-00000", "jsonl", None, ["s1"]),
    ("t.txt", "text", None, ["t1\nt2\n"]),
    ("w.warc.wet.gz", "wet", "gz", ["wet一\n"])]


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_mixed_folder_is_read_whole_wherever_it_lies(mixed, read, where, caplog):
    place = mixed
    if where == "memory":
        fsspec.filesystem("memory").put(str(mixed) + "/", "/readers/in/", recursive=True)
        place = "memory://readers/in"
    with caplog.at_level(logging.WARNING):
        reading = read([place])
    found = [(unit["name"], unit["kind"], unit["compression"]) for unit in reading.units]
    assert found == [row[:3] for row in EXPECTED]
    assert reading.texts == [text for row in EXPECTED for text in row[3]]
    assert reading.bad == []
    assert reading.tally.encodings == {"utf-8": 10}
    assert "2 files of other kinds are left out (.json: 1, .md: 1)" in caplog.text.replace(
        ".md: 1, .json: 1", ".json: 1, .md: 1")
    assert "1 empty files" in caplog.text


def test_records_carry_id_url_time_and_place(mixed, read):
    records = {record.text: record for record in read([mixed]).records}
    file = str(mixed / "a.jsonl")
    assert records["a1"] == Record("7", "http://a/7", "a1", "web", "2026-01-01", file, 1)
    assert records["a2"] == Record("a.jsonl#2", None, "a2", "web", None, file, 2)
    assert records["b1"].id == "b/a.jsonl#1"
    assert (records["p1"].id, records["p1"].url, records["p2"].id) == ("x", "u", "p.parquet#2")
    assert records["wet一\n"][:2] == ("urn:uuid:1", "http://a/1") and records["wet一\n"].time == "2026-01-02T03:04:05Z"
    table = pyarrow.Table.from_pylist([record._asdict() for record in records.values()], schema=schema())
    assert table.column("id").null_count == 0 and table.schema.names == list(Record._fields)


def test_units_have_names_of_their_own(mixed):
    config = PrepareConfig(input=[str(mixed)], output="unused")
    units = plan_files("web", SourceInput(input=[str(mixed)]), config)
    ids = [unit["id"] for unit in units]
    assert len(set(ids)) == len(ids)
    assert all(name.replace("-", "").replace("_", "").replace(".", "").isalnum() for name in ids)
    assert ids == [unit["id"] for unit in plan_files("web", SourceInput(input=[str(mixed)]), config)]


def test_two_folders_with_equal_names_never_share_a_record_id(tmp_path, read, as_lines):
    for folder in ("x/data", "y/data", "z"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.jsonl").write_bytes(as_lines(folder))
    reading = read([tmp_path / "x/data", tmp_path / "y/data", tmp_path / "z"])
    assert len({record.id for record in reading.records}) == 3
    assert reading.records[2].id == "z/1.jsonl#1"
    assert len({unit["id"] for unit in reading.units}) == 3


def test_a_file_given_twice_is_read_once(tmp_path, read, as_lines):
    (tmp_path / "1.jsonl").write_bytes(as_lines("one"))
    assert read([tmp_path, tmp_path / "1.jsonl"]).texts == ["one"]


def test_describe_has_a_row_a_file_with_its_first_record(mixed, read, as_lines):
    (mixed / "a.jsonl").write_bytes(b"bad\n" + as_lines({"id": 7, "text": "长" * 500}, "last"))
    rows = describe(read([mixed], unit_bytes=100).units)
    assert [row["file"] for row in rows] == [str(mixed / name) for name, *_ in EXPECTED]
    first = rows[0]
    assert (first["kind"], first["encoding"], first["text_field"], first["units"]) == ("jsonl", "utf-8", "text", 2)
    assert first["sample"] == {"id": "7", "url": None, "time": None, "text": "长" * 200}
    assert rows[4]["text_field"] == "content" and rows[4]["sample"]["text"] == "p1"


def _parquet_bytes(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["p"]}), tmp_path / "made")
    return (tmp_path / "made").read_bytes()


@pytest.mark.parametrize(("name", "made", "kind", "compression", "text"), [
    ("a.jsonl", lambda lines, tmp: gzip.compress(lines), "jsonl", "gz", "one"),
    ("a.jsonl.gz", lambda lines, tmp: lines, "jsonl", None, "one"),
    ("a.jsonl.gz", lambda lines, tmp: zstandard.compress(lines), "jsonl", "zst", "one"),
    ("a.jsonl", lambda lines, tmp: _parquet_bytes(tmp), "parquet", None, "p"),
    ("a.txt", lambda lines, tmp: lines, "jsonl", None, "one"),
    ("a.txt", lambda lines, tmp: WET, "wet", None, "wet一\n"),
    ("a.txt", lambda lines, tmp: b"{a} is no JSON", "text", None, "{a} is no JSON"),
])
def test_content_decides_where_the_suffix_lies(tmp_path, read, as_lines, caplog, name, made, kind, compression, text):
    path = tmp_path / "in" / name
    path.parent.mkdir()
    path.write_bytes(made(as_lines("one"), tmp_path))
    with caplog.at_level(logging.WARNING):
        reading = read([path.parent])
    assert (reading.units[0]["kind"], reading.units[0]["compression"], reading.texts) == (kind, compression, [text])
    assert ("is read as what it holds" in caplog.text) == (kind != "text")


def test_zst_may_begin_with_a_skippable_frame(tmp_path, read, as_lines):
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x50\x2a\x4d\x18\x02\x00\x00\x00ab" + zstandard.compress(as_lines("one")))
    assert read([tmp_path]).texts == ["one"]


@pytest.mark.parametrize("field", ["content", "raw_content", "body", "article", "正文"])
def test_the_text_field_is_detected(tmp_path, read, as_lines, field):
    (tmp_path / "a.jsonl").write_bytes(as_lines({"id": 1, "title": "t", "body": None, field: "one"}))
    pyarrow.parquet.write_table(pyarrow.table({"title": ["t"], field: ["two"]}), tmp_path / "b.parquet")
    assert read([tmp_path]).texts == ["one", "two"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_ambiguous_text_field_is_asked_for(tmp_path, read, as_lines, kind):
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_bytes(as_lines({"text": "one", "content": "two"}))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one"], "content": ["two"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a.{kind} has several .*: text_field=text or text_field=content"):
        read([tmp_path])
    assert read([tmp_path], text_field="content").texts == ["two"]


def test_the_question_names_the_source_of_several(tmp_path, as_lines):
    (tmp_path / "a.jsonl").write_bytes(as_lines({"text": "one", "content": "two"}))
    source = SourceInput(input=[str(tmp_path)])
    with pytest.raises(UserError, match="sources.books.text_field=content"):
        plan_files("books", source, PrepareConfig(sources={"books": source}, output="unused"))


def test_a_field_may_lie_within_another(tmp_path, read, as_lines):
    (tmp_path / "a.jsonl").write_bytes(as_lines({"doc": {"body": "one"}}, {"doc.body": "two"}))
    pyarrow.parquet.write_table(pyarrow.table({"doc": [{"body": "three", "n": 1}, None]}), tmp_path / "b.parquet")
    reading = read([tmp_path], text_field="doc.body")
    assert reading.texts == ["one", "two", "three"]
    assert [(bad.position, bad.reason) for bad in reading.bad] == [(2, "field 'doc.body' is not text but NoneType")]


@pytest.mark.parametrize(("make", "given", "message"), [
    (lambda path: (path / "a.jsonl").write_text('{"headline": "x", "n": 1}\n'), None,
     "no field of a name that is known to hold text; give text_field=, one of headline, n"),
    (lambda path: (path / "a.jsonl").write_text('{"text": "x"}\n'), "conten",
     "text_field=conten: no such field in .*a.jsonl; its fields are text"),
    (lambda path: (path / "a.md").write_text("x"), None, "holds no file that can be read: JSON lines"),
])
def test_an_input_that_cannot_be_read_is_refused(tmp_path, read, make, given, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        read([tmp_path], text_field=given)


@pytest.mark.parametrize(("place", "message"), [
    ("{}/no", "does not exist"), ("{}/a.bin", "is of no known kind"), ("memory://readers/no", "does not exist"),
    ("nosuch://x/y", "nosuch://x/y")])
def test_a_place_without_text_is_refused(tmp_path, read, place, message):
    (tmp_path / "a.bin").write_bytes(b"\x00\x01")
    with pytest.raises(UserError, match=message):
        read([place.format(tmp_path)])


def test_a_file_without_a_whole_line_has_the_field_of_the_others(tmp_path, read, as_lines):
    (tmp_path / "a.jsonl").write_bytes(as_lines("one", "two", field="content"))
    (tmp_path / "b.jsonl").write_bytes(b"not json\n")
    reading = read([tmp_path])
    assert [unit["text_field"] for unit in reading.units] == ["content", "content"]
    assert reading.units[1]["sample"] is None and len(reading.bad) == 1


def test_json_with_records_is_read_like_jsonl(tmp_path, read):
    (tmp_path / "a.json").write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two"}))
    assert read([tmp_path]).texts == ["one", "two"]


@pytest.mark.parametrize(("package", "name", "data"), [
    ("pyarrow", "a.parquet", b"PAR1"), ("zstandard", "a.jsonl.zst", zstandard.compress(b'{"text": "one"}\n')),
    ("resiliparse.parse", "a.warc", b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: 48\r\n\r\n"
     b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>\xff\r\n\r\n")])
def test_a_missing_package_is_named(tmp_path, read, monkeypatch, package, name, data):
    (tmp_path / name).write_bytes(data)
    monkeypatch.setitem(sys.modules, package, None)
    needed = package.partition(".")[0]
    with pytest.raises(UserError, match=rf"needs? the package {needed}: pip install 'ctllm-jax\[prep\]'"):
        read([tmp_path])
