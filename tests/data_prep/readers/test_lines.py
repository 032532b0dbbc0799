"""JSON lines and plain text: any cut gives the same records, and what is bad costs only itself."""

import gzip
import json
import random
import tempfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ctllm_jax.config.prepare import PrepareConfig
from data_prep.readers import read_unit

LINES = st.lists(st.one_of(
    st.text(max_size=40).map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "replace")),
    st.sampled_from([b"", b"  ", b"\r", b"not json", b'{"text": 1}', b'{"text": "\xff"}', b'{"id": 9, "text": "a"}']),
), max_size=30)


@settings(max_examples=60, deadline=None)
@given(lines=LINES, bom=st.booleans(), last_newline=st.booleans(), unit_bytes=st.integers(1, 300))
def test_any_cut_gives_the_records_of_the_whole(read, lines, bom, last_newline, unit_bytes):
    data = b"\xef\xbb\xbf" * bom + b'{"text": "first"}\n' + b"\n".join(lines) + b"\n" * last_newline
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.jsonl").write_bytes(data)
        whole, cut = read([folder]), read([folder], unit_bytes=unit_bytes)
    assert cut.records == whole.records and cut.bad == whole.bad and cut.tally == whole.tally
    assert len(whole.units) == 1
    # The units lie end to end, and each begins with a line.
    assert sum(unit["size"] for unit in cut.units) == len(data)
    for before, after in zip(cut.units, cut.units[1:], strict=False):
        assert before["stop"] == after["start"] and data[after["start"] - 1:after["start"]] == b"\n"
        assert after["start"] - before["start"] >= unit_bytes


def test_a_large_file_is_cut_where_pages_meet(tmp_path, read, as_lines, monkeypatch):
    monkeypatch.setattr("data_prep.readers.lines._PAGE", 7)
    (tmp_path / "a.jsonl").write_bytes(as_lines(*map(str, range(40))))
    cut = read([tmp_path], unit_bytes=50)
    assert len(cut.units) == 10 and cut.texts == list(map(str, range(40)))
    assert [record.position for record in cut.records] == list(range(1, 41))


@pytest.mark.parametrize(("line", "reason"), [
    (b'{"text": "a', "malformed JSON at character 11"),
    (b"\x00\x01", "malformed JSON"),
    (b'{"text": "\xff\xfe"}', "invalid UTF-8 at byte 10 of the line"),
    (b'{"content": "a"}', "no field 'text'; its fields are 'content'"),
    (b'{"text": 3}', "field 'text' is not text but int"),
    (b'{"text": null}', "field 'text' is not text but NoneType"),
    (b'["text"]', "not a JSON object but list"),
    (b'{"text": "\\ud83d"}', "holds half of a surrogate pair at character 0"),
    (b'{"text": ' + b"[" * 100_000, "malformed JSON"),
])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gz", "zst"])
def test_a_bad_line_costs_itself(tmp_path, read, as_lines, line, reason, pack):
    path = tmp_path / "a.jsonl"
    path.write_bytes(pack(as_lines("one", "two") + line + b"\n\n" + as_lines("five")))
    reading = read([path])
    assert [(record.text, record.position) for record in reading.records] == [("one", 1), ("two", 2), ("five", 5)]
    (bad,) = reading.bad
    assert (bad.file, bad.position) == (str(path), 3)
    assert reason in bad.reason and bad.raw == line + b"\n"


@pytest.mark.parametrize("harm", [lambda data: data[:-1], lambda data: data[:-len(data) // 4],
                                  lambda data: data[:-400] + b"\xff" * 100 + data[-300:]], ids=["end", "cut", "middle"])
@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor(write_checksum=True).compress])
def test_damaged_compression_costs_the_rest_of_its_file(tmp_path, read, as_lines, pack, harm):
    draw = random.Random(1)
    texts = ["".join(draw.choices("abcdefghij", k=300)) for _ in range(4000)]
    (tmp_path / "a.jsonl.packed").write_bytes(harm(pack(as_lines(*texts))))
    (tmp_path / "b.jsonl").write_bytes(as_lines("whole"))
    reading = read([tmp_path / "a.jsonl.packed", tmp_path / "b.jsonl"])
    count = len(reading.texts) - 1
    assert count > 1000 and reading.texts == [*texts[:count], "whole"]
    (bad,) = reading.bad
    assert bad.position == count + 1 and bad.reason.startswith("the compressed data is damaged or ends early")


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.txt.zst", "a.warc.zst"])
def test_a_zstd_window_that_is_too_large_is_named(tmp_path, read, as_lines, name):
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    (tmp_path / name).write_bytes(packer.compress(as_lines("one")) + packer.flush())
    (tmp_path / "b.jsonl").write_bytes(as_lines("two"))
    reading = read([tmp_path])
    assert reading.texts == ["two"] and "its zstd window is larger than 128 MiB" in reading.bad[0].reason


def test_an_own_id_that_is_no_label_gives_way_to_the_place(tmp_path, read, as_lines):
    own = ["x", None, "", [1], 5]
    (tmp_path / "a.jsonl").write_bytes(as_lines(*({"id": label, "text": "t"} for label in own)))
    assert [record.id for record in read([tmp_path]).records] == ["x", "a.jsonl#2", "a.jsonl#3", "a.jsonl#4", "5"]


def test_half_a_surrogate_in_an_address_does_not_cost_the_text(tmp_path, read):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "url": "http://a/\\ud83d"}\n')
    assert read([tmp_path]).records[0].url == "http://a/?"


def test_a_text_file_is_one_document_as_it_stands(tmp_path, read):
    (tmp_path / "a.txt").write_bytes("\ufeff第一行\n\n第二行\r\n".encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("三".encode()))
    reading = read([tmp_path])
    assert [(record.id, record.text) for record in reading.records] == [
        ("a.txt#1", "第一行\n\n第二行\r\n"), ("b.txt.gz#1", "三")]


@pytest.mark.parametrize(("name", "data", "position", "reason"), [
    ("a.txt", "一\n二\n".encode() + b"\xff\n", 3, "invalid UTF-8 at byte 8 of the file"),
    ("a.txt.gz", gzip.compress(b"long enough", mtime=0)[:-4], 1, "the compressed data is damaged or ends early"),
    ("a.txt", "一\n".encode("utf-16") + b"\xff", 2, "invalid UTF-16 at byte 6 of the file"),
])
def test_a_damaged_text_file_is_put_aside_whole(tmp_path, read, name, data, position, reason):
    (tmp_path / name).write_bytes(data)
    reading = read([tmp_path])
    assert reading.records == []
    assert [(bad.position, reason in bad.reason) for bad in reading.bad] == [(position, True)]


def test_a_file_that_goes_away_is_an_error_and_no_bad_record(tmp_path, read, as_lines):
    (tmp_path / "a.jsonl").write_bytes(as_lines("one"))
    (unit,) = read([tmp_path]).units
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(FileNotFoundError):
        list(read_unit(unit, PrepareConfig(input=["x"], output="x"), None))
