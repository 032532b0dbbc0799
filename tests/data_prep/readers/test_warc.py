"""WET and WARC: pages in any encoding, what is no page counted, and what is damaged costs only itself."""

import gzip
import hashlib
import io
import logging
import random
import zlib

import brotli
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from data_prep.readers.warc import warc_records

# warcio leaves the temporary files of its records open.
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed file <tempfile.SpooledTemporaryFile:ResourceWarning")

PARAGRAPH = "我们的国家是一个大国，人民在这里生活。他们说今天的天气很好，大家都到公园里去。"
TRADITIONAL = "我們的國家是一個大國，人民在這裡生活。他們說今天的天氣很好，大家都到公園裡去。"


def page(text=PARAGRAPH, meta=""):
    """A page whose main text is two paragraphs."""
    return (f"<html><head>{meta}<title>题目</title><script>var no = 1;</script></head><body>"
            f"<nav><a href=/>首页</a></nav>"
            f"<article><p>{text}</p><p>第二段：{text}</p></article><footer>版权所有</footer></body></html>")


def archive(write, *, gz=True):
    """The bytes of a WARC file that `write(writer)` fills."""
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=gz)
    writer.write_record(writer.create_warcinfo_record("a.warc.gz", {"software": "test"}))
    write(writer)
    return out.getvalue()


def response(writer, body, *, url="http://a/1", kind="text/html", status="200 OK", headers=(), record="response"):
    head = StatusAndHeaders(status, [("Content-Type", kind), *headers], protocol="HTTP/1.1")
    writer.write_record(writer.create_warc_record(url, record, payload=io.BytesIO(body), http_headers=head))


def conversions(*texts):
    def write(writer):
        for index, text in enumerate(texts):
            data = text if isinstance(text, bytes) else text.encode()
            writer.write_record(writer.create_warc_record(f"http://a/{index}", "conversion", payload=io.BytesIO(data),
                                                          warc_content_type="text/plain"))

    return write


def one(read, folder, body, **how):
    """Reading of a WARC with a single response."""
    (folder / "a.warc.gz").write_bytes(archive(lambda writer: response(writer, body, **how)))
    return read([folder])


@pytest.mark.parametrize(("name", "pack"), [
    ("a.warc.wet.gz", lambda write: archive(write)), ("a.warc.wet", lambda write: archive(write, gz=False)),
    ("whole.wet.gz", lambda write: gzip.compress(archive(write, gz=False))),
    ("a.warc.wet.zst", lambda write: zstandard.compress(archive(write, gz=False))),
    ("conversions.warc.gz", lambda write: archive(write))])
def test_wet_records_come_in_order(tmp_path, read, name, pack):
    (tmp_path / name).write_bytes(pack(conversions("一\n二\n", "", "x" * 300_000)))
    reading = read([tmp_path])
    assert reading.units[0]["kind"] == "wet"
    assert [(record.text, record.position) for record in reading.records] == [
        ("一\n二\n", 2), ("", 3), ("x" * 300_000, 4)]
    assert [record.url for record in reading.records] == ["http://a/0", "http://a/1", "http://a/2"]
    assert reading.records[0].id.startswith("urn:uuid:") and reading.records[0].time
    assert reading.bad == [] and reading.tally.left_out == {"record of type warcinfo": 1}


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
def test_the_main_text_of_a_page_is_taken(tmp_path, read, extractor):
    text = PARAGRAPH * 6  # trafilatura takes the menu too where there is little else.
    (tmp_path / "a.warc.gz").write_bytes(archive(lambda writer: response(writer, page(text).encode())))
    (record,) = read([tmp_path], html=extractor).records
    lines = [line for line in record.text.splitlines() if line]
    assert lines == [text, "第二段：" + text]


def meta(charset):
    return f'<meta http-equiv="Content-Type" content="text/html; charset={charset}">'


@pytest.mark.parametrize(("text", "codec", "kind", "tag", "name"), [
    (PARAGRAPH, "gb2312", "text/html; charset=gb2312", "", "gb18030"),
    (PARAGRAPH, "gb2312", "text/html", meta("gb2312"), "gb18030"),
    (PARAGRAPH, "gbk", 'text/html;Charset="GBK"', meta("big5"), "gb18030"),
    (PARAGRAPH + "㐀", "gb18030", "text/html; charset=gb2312", "", "gb18030"),
    (PARAGRAPH, "gbk", "text/html", "", "gb18030"),
    (PARAGRAPH, "gbk", "text/html; charset=ISO-8859-1", "", "gb18030"),
    (PARAGRAPH, "gbk", "text/html; charset=nonsense", meta("gbk"), "gb18030"),
    (PARAGRAPH, "utf-8", "text/html; charset=gb2312", meta("gb2312"), "utf-8"),
    (PARAGRAPH, "utf-8-sig", "text/html", "", "utf-8"),
    (PARAGRAPH, "utf-16", "text/html", "", "utf-16"),
    (TRADITIONAL, "big5", "text/html; charset=big5", "", "big5"),
    (TRADITIONAL, "big5", "text/html", meta("big5"), "big5"),
    (TRADITIONAL, "big5", "text/html", "", "big5"),
    ("Only ASCII here, and enough of it to be a paragraph.", "ascii", "application/xhtml+xml", "", "utf-8"),
])
def test_a_page_is_read_in_its_encoding(tmp_path, read, text, codec, kind, tag, name):
    html = page(text, tag).replace("题目", "").replace("第二段：", "").replace("首页", "").replace("版权所有", "")
    reading = one(read, tmp_path, html.encode(codec), kind=kind)
    assert [line for line in reading.texts[0].splitlines() if line] == [text, text]
    assert reading.tally.encodings == {name: 1}


def test_bytes_that_fit_no_encoding_cost_characters_and_no_page(tmp_path, read):
    html = page().encode("gbk").replace("今天".encode("gbk"), b"\xff\xff", 1)
    (text,) = one(read, tmp_path, html, kind="text/html; charset=gbk").texts
    assert "\ufffd" in text and "大家都到公园里去" in text


@pytest.mark.parametrize(("how", "body"), [
    ({"headers": [("Content-Encoding", "gzip")]}, gzip.compress(page().encode(), mtime=0)),
    ({"headers": [("Content-Encoding", "deflate")]}, zlib.compress(page().encode())),
    ({"headers": [("Transfer-Encoding", "chunked")]},
     b"10\r\n" + page().encode()[:16] + b"\r\n%x;x=y\r\n" % (len(page().encode()) - 16) + page().encode()[16:]
     + b"\r\n0\r\n\r\n"),
    # The crawler undid it and left the header.
    ({"headers": [("Content-Encoding", "gzip"), ("Transfer-Encoding", "chunked")]}, page().encode()),
    ({"headers": [("Content-Encoding", "br")]}, page().encode()),
    ({"headers": [("Content-Encoding", "br")]}, brotli.compress(page().encode())),
    ({"headers": [("Content-Encoding", "zstd")]}, zstandard.compress(page().encode()[:99])
     + zstandard.compress(page().encode()[99:])),
    ({"headers": [("Content-Encoding", "gzip, gzip")]}, gzip.compress(gzip.compress(page().encode()))),
    ({"headers": [("Content-Encoding", "gzip"), ("Content-Encoding", "br")]}, brotli.compress(gzip.compress(
        page().encode()))),
    ({"headers": [("Transfer-Encoding", "gzip")]}, gzip.compress(page().encode())),
    # Several members, and what some servers put after the last.
    ({"headers": [("Content-Encoding", "gzip")]}, gzip.compress(page().encode()[:99]) + gzip.compress(
        page().encode()[99:]) + b"\r\n"),
    ({"headers": [("Content-Encoding", "gzip")]}, gzip.compress(
        b"<!--" + random.Random(0).randbytes(9000).hex().encode()) + gzip.compress(b"") * 999 + gzip.compress(
        b"-->" + page().encode())),
    # A crawler left the header, and a line of the page looks like a length.
    ({"headers": [("Transfer-Encoding", "chunked")]}, b"-6\r\n" + page().encode()),
    ({"headers": [("Content-Encoding", "compress")]}, page().encode("gbk")),
])
def test_transfer_is_undone(tmp_path, read, how, body):
    assert PARAGRAPH in one(read, tmp_path, body, **how).texts[0]


@pytest.mark.parametrize(("how", "reason"), [
    ({"kind": "application/pdf"}, "HTTP type application/pdf"), ({"kind": ""}, "HTTP type not given"),
    ({"status": "404 Not Found"}, "HTTP status 404"), ({"record": "revisit"}, "record of type revisit"),
    ({"headers": [("Content-Encoding", "compress")]}, "HTTP coding compress"),
    ({"headers": [("Content-Encoding", "dcb, gzip")]}, "HTTP coding dcb"),
])
def test_what_is_no_page_is_counted_and_not_bad(tmp_path, read, how, reason):
    reading = one(read, tmp_path, gzip.compress(b"\x8b\x01 no page"), **how)
    assert reading.records == [] and reading.bad == []
    assert reading.tally.left_out == {"record of type warcinfo": 1, reason: 1}


def test_a_page_without_text_is_an_empty_record(tmp_path, read):
    assert one(read, tmp_path, b"<html><body></body></html>").texts == [""]


@pytest.mark.parametrize(("body", "reason"), [
    (b"no http", "malformed HTTP response"),
    (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n", "malformed HTTP response"),
    (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8b\x08\x00" + b"\xff" * 40,
     "the compressed body is damaged"),
    (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: br\r\n\r\n" + b"\x00\xff" * 40,
     "the compressed body is damaged"),
    (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: zstd\r\n\r\n" + b"\x00\xff" * 40,
     "the compressed body is damaged"),
    *((b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: " + name + b"\r\n\r\n" + pack(
        b"<p>" + b" " * (17 << 20)), "the body, decompressed, has more than 16 MiB")
      for name, pack in ((b"gzip", gzip.compress), (b"br", lambda data: brotli.compress(data, quality=1)),
                         (b"zstd", zstandard.compress), (b"deflate", zlib.compress))),
    # Neither the first, the second nor the third is a page that a parser could take in some seconds.
    *((b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + html, "inside one another: more than is read")
      for html in (b"<div>" * 70_000, b"<div><object></div></object>" * 8000,
                   b"<p>" + b"<b x>" * 1000 + b"</p>" + b"<p>x" * 1000))])
def test_a_malformed_response_is_put_aside(tmp_path, read, body, reason):
    bad = b"WARC/1.1\r\nWARC-Type: response\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n" % (len(body), body)
    (tmp_path / "a.warc").write_bytes(bad + archive(lambda writer: response(writer, page().encode()), gz=False))
    reading = read([tmp_path])
    assert len(reading.records) == 1
    assert [(bad.position, reason in bad.reason) for bad in reading.bad] == [(1, True)]


def test_invalid_utf8_in_wet_is_put_aside(tmp_path, read):
    (tmp_path / "a.warc.wet.gz").write_bytes(archive(conversions("one", b"two \xff", "three")))
    reading = read([tmp_path])
    assert reading.texts == ["one", "three"]
    assert [(bad.position, bad.reason, bad.raw) for bad in reading.bad] == [
        (3, "invalid UTF-8 at byte 4 of the record", b"two \xff")]


def test_line_ends_may_be_lf(tmp_path, read):
    data = archive(conversions("one", "two", "three"), gz=False).replace(b"\r\n", b"\n")
    (tmp_path / "a.wet").write_bytes(data)
    assert read([tmp_path]).texts == ["one", "two", "three"] and read([tmp_path]).bad == []


@pytest.mark.parametrize("end", [b"", b"\r\n", b"\nWARC-Type: conversion\n"])
@pytest.mark.parametrize("gz", [True, False])
def test_a_file_that_ends_inside_a_header_has_one_bad_record(tmp_path, read, gz, end):
    cut = b"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Ta" + end
    (tmp_path / "a.wet").write_bytes(archive(conversions("one", "two"), gz=gz) + (gzip.compress(cut) if gz else cut))
    reading = read([tmp_path])
    assert reading.texts == ["one", "two"]
    start = len(archive(conversions("one", "two"), gz=False))
    assert [(bad.position, bad.reason) for bad in reading.bad] == [
        (4, f"the file ends inside a record's header, in the record at byte {start:,} "
            f"{'after decompression' if gz else 'of the file'}")]


def test_beginnings_of_records_alone_are_one_bad_record(tmp_path, read):
    (tmp_path / "a.wet").write_bytes(b"WARC/1.0\nContent-Length: 60000000\n\n" * 2 + b"WARC/1.0\n" * 5000)
    assert len(read([tmp_path]).bad) == 1


TEXTS = [f"document {index} " + "文" * 500 for index in range(8)]


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize("cut", [1, 3, 4, 5, 30, 200])
def test_a_cut_file_keeps_what_is_whole(tmp_path, read, gz, cut):
    data = archive(conversions(*TEXTS), gz=gz)
    (tmp_path / "a.warc.wet").write_bytes(data[:-cut])
    reading = read([tmp_path])
    assert reading.texts in (TEXTS, TEXTS[:-1])
    if gz or cut > 4:  # The blank lines after the last record of an uncompressed file are no loss.
        assert len(reading.bad) == 1 and reading.bad[0].position == len(reading.texts) + 2
        assert "end" in reading.bad[0].reason


def test_a_damaged_member_costs_its_record(tmp_path, read):
    data = bytearray(archive(conversions(*TEXTS)))
    starts = [at for at in range(len(data)) if data[at:at + 3] == b"\x1f\x8b\x08"]
    assert len(starts) == 9
    data[starts[4] + 30:starts[5] - 20] = b"\xff" * (starts[5] - starts[4] - 50)
    (tmp_path / "a.warc.wet.gz").write_bytes(data)
    reading = read([tmp_path])
    assert reading.texts == TEXTS[:3] + TEXTS[4:]
    assert [(bad.position, "the compressed data is damaged" in bad.reason) for bad in reading.bad] == [(5, True)]


@pytest.mark.parametrize(("old", "new"), [
    (b"Content-Length: 1511", b"Content-Length: 2511"), (b"Content-Length: 1511", b"Content-Length: 1011"),
    (b"Content-Length: 1511", b"Content-Length: 99999"), (b"Content-Length: 1511", b"Content-Length: many"),
    (b"Content-Length: 1511", b"Content-Length: -1"), (b"Content-Length: 1511", b"Content-Height: 1511"),
    (b"WARC/1.0\r\n", b"WORK/1.0\r\n")])
def test_a_malformed_header_costs_its_record(tmp_path, read, old, new):
    whole = archive(conversions(*TEXTS), gz=False)
    at = whole.index(b"WARC/1.0", whole.index(b"document 2"))
    assert old in whole[at:at + 500]
    (tmp_path / "a.warc.wet").write_bytes(whole[:at] + whole[at:].replace(old, new, 1))
    reading = read([tmp_path])
    assert reading.texts == TEXTS[:3] + TEXTS[4:]
    assert [bad.position for bad in reading.bad] == [5]


def test_a_file_that_is_no_warc_is_put_aside_once(tmp_path, read):
    (tmp_path / "a.warc.gz").write_bytes(b"<html>not found</html>\n" * 1000)
    reading = read([tmp_path])
    assert [(bad.position, bad.reason) for bad in reading.bad] == [
        (1, "not the start of a WARC record, at byte 0 of the file")]


def test_a_record_that_is_too_large_is_not_held(tmp_path, read, monkeypatch):
    monkeypatch.setattr("data_prep.readers.warc.LARGEST", 2000)
    (tmp_path / "a.warc.wet.gz").write_bytes(archive(conversions("one", "x" * 300_000, "three")))
    reading = read([tmp_path])
    assert reading.texts == ["one", "three"] and reading.bad == []
    assert sum(reading.tally.left_out.values()) == 2


@pytest.mark.parametrize("chunk", [1, 2, 7, 100])
@pytest.mark.parametrize("gz", [True, False])
def test_pieces_of_any_size_give_the_same_records(monkeypatch, chunk, gz):
    monkeypatch.setattr("data_prep.readers.warc._CHUNK", chunk)
    data, bad = archive(conversions("一", "", "three"), gz=gz) + b"\0" * 3 * gz, []
    found = list(warc_records(io.BytesIO(data), "gz" if gz else None, file="a", wanted=lambda headers: True,
                              damaged=lambda *entry: bad.append(entry)))
    assert [record.block.decode() for record in found[1:]] == ["一", "", "three"]
    assert [record.number for record in found] == [1, 2, 3, 4] and bad == []


def test_a_page_that_the_parser_chokes_on_is_put_aside(tmp_path, read, monkeypatch, caplog):
    from resiliparse.extract import html2text

    def choke(html, **options):
        raise RuntimeError("no tree")

    monkeypatch.setattr(html2text, "extract_plain_text", choke)
    with caplog.at_level(logging.WARNING):
        reading = one(read, tmp_path, page().encode())
    assert [bad.reason for bad in reading.bad] == ["resiliparse cannot parse the page: no tree"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("stubborn", [False, True])
def test_a_page_that_takes_too_long_is_put_aside(tmp_path, read, monkeypatch, stubborn):
    """Also where a parser takes every exception for a page that it cannot read, and begins again."""
    from resiliparse.extract import html2text

    def forever(html, **options):
        while True:
            try:
                while True:
                    pass
            except Exception:
                if not stubborn:
                    raise

    monkeypatch.setattr(html2text, "extract_plain_text", forever)
    (tmp_path / "a.warc.gz").write_bytes(archive(lambda writer: response(writer, page().encode())))
    (tmp_path / "b.wet").write_bytes(archive(conversions("the next file"), gz=False))
    reading = read([tmp_path], record_seconds=0.2)
    assert [bad.reason for bad in reading.bad] == ["it takes more than 0.2 s of CPU time, which record_seconds allows"]
    assert reading.texts == ["the next file"]


@settings(max_examples=80, deadline=None)
@given(at=st.integers(0, 1736), length=st.integers(0, 40), noise=st.binary(max_size=40), gz=st.booleans())
@example(at=90, length=20, noise=b"\x05\x13\xb9\x8f", gz=True)  # the damaged member decodes to the end of the file
def test_damage_anywhere_costs_a_few_records_and_is_told(at, length, noise, gz):
    blocks = [hashlib.sha256(bytes([index])).hexdigest()[:12].encode() for index in range(20)]
    parts = [b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 12\r\n\r\n%s\r\n\r\n" % block for block in blocks]
    whole = b"".join(map(gzip.compress, parts) if gz else parts)
    at %= len(whole)
    bad = []
    found = [record.block for record in
             warc_records(io.BytesIO(whole[:at] + noise + whole[at + length:]), "gz" if gz else None, file="a",
                          wanted=lambda headers: True, damaged=lambda *entry: bad.append(entry))]
    good = [blocks.index(block) for block in found if block in blocks]
    assert len(good) >= 16 and good == sorted(set(good))
    # Of what is cut out, one record may vanish without a trace: its end and the next one's beginning.
    assert len(good) >= 19 or bad
