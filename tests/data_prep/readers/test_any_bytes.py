"""Whatever the bytes of a file are, its reader comes to an end, raises nothing, and says what it could not read."""

import gzip
import io
import signal
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ctllm_jax.dataset.text import Quarantine, read_documents

WEB = b"".join(b"WARC/1.0\r\nWARC-Type: %s\r\nWARC-Target-URI: http://a/%d\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n"
               % (kind, index, len(block), block) for index, (kind, block) in enumerate([
                   (b"warcinfo", b"a: b\r\n"), (b"conversion", "一二三\n".encode()), (b"request", b"GET /"),
                   (b"response", b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\n\r\n"
                    + gzip.compress(b"<p>page</p>", mtime=0)), (b"conversion", b"last")]))
LINES = "".join(f'{{"id": {index}, "text": "文{index}"}}\n' for index in range(20)).encode()
_TABLE = io.BytesIO()
pyarrow.parquet.write_table(pyarrow.table({"text": ["p1", "p2"] * 40, "id": list(range(80))}), _TABLE,
                            row_group_size=20)
FILES = {
    "a.wet": WEB, "lf.warc": WEB.replace(b"\r\n", b"\n"), "a.warc.gz": gzip.compress(WEB, mtime=0),
    "a.warc.zst": zstandard.compress(WEB), "a.jsonl": LINES, "a.jsonl.gz": gzip.compress(LINES, mtime=0),
    "a.jsonl.zst": zstandard.compress(LINES), "16.jsonl": LINES.decode().encode("utf-16"),
    "gb.jsonl": LINES.decode().encode("gb18030"), "a.txt": "一\n二".encode(), "16.txt": "一\n二".encode("utf-16"),
    "a.txt.gz": gzip.compress("一\n二".encode(), mtime=0), "a.parquet": _TABLE.getvalue()}


@pytest.fixture(autouse=True)
def no_endless_loop():
    """A loop that makes no progress becomes a failure; a minute of CPU time is a thousand times what is needed."""
    def stop(*_):
        raise AssertionError("the reader does not come to an end")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 60)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


@st.composite
def harmed(draw):
    """A file of some kind, cut, with bytes changed, or with a piece of it twice."""
    name = draw(st.sampled_from(sorted(FILES)))
    data = FILES[name]
    at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 60))
    how = draw(st.sampled_from(["cut", "change", "repeat", "random"]))
    if how == "cut":
        return name, data[:at], how
    if how == "change":
        return name, data[:at] + draw(st.binary(max_size=20)) + data[at + length:], how
    if how == "repeat":
        return name, data[:at] + data[max(0, at - length):], how
    return name, data[:4] + draw(st.binary(max_size=300)), how


@settings(max_examples=80, deadline=None)
@given(case=harmed())
def test_every_reader_ends_on_any_bytes(read, case):
    name, data, how = case
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(FILES[name])
        whole = read([Path(folder) / name], text_field="text") if how == "cut" else None
        (Path(folder) / name).write_bytes(data or b"\n")
        found = read([Path(folder) / name], text_field="text")
        documents = name.removeprefix("16").endswith((".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet"))
        if documents and data:
            list(read_documents([Path(folder) / name], text_field="text", quarantine=Quarantine(None, 10**6)))
    positions = [record.position for record in found.records]
    assert positions == sorted(set(positions))
    assert all(bad.reason and bad.position >= 1 for bad in found.bad)
    for record in found.records:
        record.text.encode()
    if how == "cut" and not name.endswith((".txt", ".txt.gz")):
        lost = len(whole.records) - len(found.records)
        assert [record.text for record in found.records] == [record.text for record in whole.records][:len(positions)]
        # What ends between two records says nothing of those that followed, if it is not compressed.
        assert not lost or found.bad or name in ("a.jsonl", "16.jsonl", "gb.jsonl", "a.wet", "lf.warc") or not data
