"""Text files to documents: every kind, in a fixed order, and what cannot be read put aside without loss."""

import gzip
import json
import logging
import random

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.dataset.text import Quarantine, find_files, read_documents


def lines(*texts, field="text"):
    """JSON lines as bytes."""
    return b"".join(json.dumps({"id": 1, field: text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def read(inputs, *, max_bad=0, field="text", tmp_path=None):
    """(texts, quarantine) of some inputs."""
    quarantine = Quarantine(tmp_path / "bad.jsonl" if tmp_path else None, max_bad=max_bad)
    files = find_files([str(path) for path in inputs])
    return [document.text for document in read_documents(files, text_field=field, quarantine=quarantine)], quarantine


def write_parquet(path, texts, *, field="text"):
    """A table with a text column, in row groups of two."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({field: texts, "other": list(range(len(texts)))}), path, row_group_size=2)


def zstd(data):
    """Two frames, as tools that append write them."""
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


@pytest.mark.parametrize("name, packed", [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd)])
def test_json_lines_come_as_they_are(tmp_path, name, packed):
    texts = ["第一行\n第二行", "  spaces  ", "\u2028 is no line end", "tab\t", "\U0001f600", "", "x" * 3_000_000]
    (tmp_path / name).write_bytes(packed(b"\xef\xbb\xbf" + lines(*texts) + b"\r\n \n" + lines("last")[:-1]))
    assert read([tmp_path / name])[0] == [*texts, "last"]


def test_parquet_comes_by_its_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["一", "two", "3", "4", "5"], field="content")
    assert read([tmp_path / "a.parquet"], field="content")[0] == ["一", "two", "3", "4", "5"]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff第一行\n\n第二行\r\n".encode())
    assert read([tmp_path / "a.txt"])[0] == ["第一行\n\n第二行\r\n"]


def test_folders_are_read_in_order_and_each_file_once(tmp_path, caplog):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b/2.txt", "a.txt", "b/1.txt", ".git/x.txt", "b/.hidden.txt", "b/note.md"):
        (tmp_path / name).write_text(name)
    with caplog.at_level(logging.WARNING):
        assert read([tmp_path, tmp_path / "a.txt", tmp_path / "b"])[0] == ["a.txt", "b/1.txt", "b/2.txt"]
    assert "1 files of other kinds are left out" in caplog.text


@pytest.mark.parametrize("line, reason", [
    (b'{"text": "a', "malformed JSON at character 11"),
    (b"not json", "malformed JSON at character 0"),
    (b'{"text": "\xff\xfe"}', "invalid UTF-8 at byte 10 of the line"),
    (b'{"content": "a"}', "no field 'text'; its fields are 'content'"),
    (b'{"text": 3}', "field 'text' is not text but int"),
    (b'{"text": null}', "field 'text' is not text but NoneType"),
    (b'["text"]', "not a JSON object but list"),
    (b'{"text": "\\ud83d"}', "holds half of a surrogate pair at character 0"),
    (b'{"text": ' + b"[" * 100_000, "malformed JSON"),
    (b'{"n": ' + b"1" * 5000 + b', "text": "a"}', "Exceeds the limit"),
])
def test_a_bad_line_is_put_aside_and_nothing_else_is_lost(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("one", "two") + line + b"\n" + lines("four"))
    texts, quarantine = read([path], max_bad=1, tmp_path=tmp_path)
    assert texts == ["one", "two", "four"]
    entry = json.loads((tmp_path / "bad.jsonl").read_text())
    assert (entry["file"], entry["line"]) == (str(path), 3)
    assert reason in entry["reason"]
    assert entry["raw"].startswith(line[:5].decode("utf-8", "backslashreplace"))
    with pytest.raises(UserError) as refused:
        read([path], tmp_path=tmp_path)
    assert str(refused.value).startswith(f"{path}:3: ")
    assert reason in str(refused.value)
    assert "allowed: max_bad=0; they are listed in" in str(refused.value)


def test_the_budget_counts_over_all_files(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(b"bad\n" + lines(name))
    assert read([tmp_path], max_bad=2)[0] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(UserError, match=r"b.jsonl:1: malformed.*Bad records: 2, allowed: max_bad=1$"):
        read([tmp_path], max_bad=1)


@pytest.mark.parametrize("harm", [lambda data: data[:-1], lambda data: data[:-len(data) // 4]])
@pytest.mark.parametrize("name, packed", [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd)])
def test_a_cut_file_keeps_what_can_be_read_and_is_named(tmp_path, name, packed, harm):
    texts = ["".join(random.Random(index).choices("abcdefghij", k=300)) for index in range(4000)]
    (tmp_path / name).write_bytes(harm(packed(lines(*texts))))
    (tmp_path / "b.txt").write_text("whole")
    found, quarantine = read([tmp_path / name, tmp_path / "b.txt"], max_bad=1, tmp_path=tmp_path)
    assert len(found) > 1000
    assert found == [*texts[:len(found) - 1], "whole"]
    entry = json.loads((tmp_path / "bad.jsonl").read_text())
    assert entry["file"].endswith(name) and entry["line"] == len(found)
    assert "the compressed data is damaged or ends early" in entry["reason"]


def test_a_zst_file_cut_between_two_lines_is_not_taken_for_whole(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    stream = zstandard.ZstdCompressor().compressobj()
    cut = stream.compress(lines("one", "two")) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (tmp_path / "a.jsonl.zst").write_bytes(cut)
    texts, quarantine = read([tmp_path], max_bad=1)
    assert (texts, quarantine.count) == (["one", "two"], 1)
    with pytest.raises(UserError, match=r"a.jsonl.zst:3: .* its last part is not complete"):
        read([tmp_path])


def test_a_damaged_parquet_file_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["一"] * 9)
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-10])
    (tmp_path / "b.txt").write_text("whole")
    texts, quarantine = read([tmp_path], max_bad=1, tmp_path=tmp_path)
    assert texts == ["whole"]
    assert "the Parquet file is damaged" in json.loads((tmp_path / "bad.jsonl").read_text())["reason"]


def test_a_bad_value_in_parquet_costs_its_row(tmp_path):
    write_parquet(tmp_path / "a.parquet", [b"one", b"\xff\xfe", None, "四".encode()])
    texts, quarantine = read([tmp_path], max_bad=2, tmp_path=tmp_path)
    assert texts == ["one", "四"]
    entries = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in entries] == [
        (2, "invalid UTF-8"), (3, "field 'text' is not text but NoneType")]


def test_a_missing_column_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["一"], field="content")
    with pytest.raises(UserError, match=r"a.parquet:1: no column 'text'; its columns are 'content', 'other'"):
        read([tmp_path])


def test_invalid_utf8_in_a_text_file_names_the_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("一\n二\n".encode() + b"\xff\n")
    with pytest.raises(UserError, match=r"a.txt:3: invalid UTF-8 at byte 8 of the file"):
        read([tmp_path])


@pytest.mark.parametrize("name, message", [
    ("no.jsonl", "no.jsonl does not exist"), ("a.md", r"a.md must end in one of .jsonl, .jsonl.gz"),
    ("folder", "no file in this folder ends in")])
def test_an_input_that_is_no_text_is_refused(tmp_path, name, message):
    (tmp_path / "a.md").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=message):
        find_files([str(tmp_path / name)])
    with pytest.raises(UserError, match="input is empty"):
        find_files([])


def test_progress_reaches_the_size_of_the_files(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(*map(str, range(100)))))
    (tmp_path / "b.txt").write_text("x")
    seen = []
    files = find_files([str(tmp_path)])
    list(read_documents(files, text_field="text", quarantine=Quarantine(None, 0), progress=seen.append))
    assert seen == sorted(seen) and seen[-1] == sum(path.stat().st_size for path in files)


def test_a_line_that_is_too_long_costs_itself_and_unicode_is_known_by_its_mark(tmp_path, monkeypatch):
    monkeypatch.setattr("ctllm_jax.dataset.text.LARGEST_LINE", 99)
    lines = '{"text": "一"}\n{"text": "' + "x" * 99 + '"}\n{"text": "三"}\n'
    for name, encoding in (("a.jsonl", "utf-8"), ("b.jsonl", "utf-16")):
        (tmp_path / name).write_bytes(lines.encode(encoding))
        bad = Quarantine(tmp_path / f"{name}.bad", max_bad=1)
        found = read_documents([tmp_path / name], text_field="text", quarantine=bad)
        assert [(document.line, document.text) for document in found] == [(1, "一"), (3, "三")]
        assert "a line of 112 bytes; more than 99 are not read" in bad.path.read_text()
    (tmp_path / "c.txt").write_bytes("一\n".encode("utf-16"))
    assert [document.text for document in read_documents([tmp_path / "c.txt"], text_field="text", quarantine=bad)] == [
        "一\n"]
