"""JSON lines, whole or by byte ranges, and plain text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from ctllm_jax.dataset.text import (
    BOM,
    as_utf8,
    broken_stream_errors,
    checked_value,
    decompressed,
    describe_damage,
    parse_json,
    read_line,
)
from data_prep.readers.encodings import CODECS, line_codec
from data_prep.readers.fields import MISSING, as_label, lookup
from data_prep.readers.files import open_file
from data_prep.readers.unit import NUL, InputUnit, Quarantine, Tally, check_size
from data_prep.records import Record

_PAGE = 2**22


def line_ranges(stream: BinaryIO, unit_bytes: int) -> list[tuple[int, int, int]]:
    """Cut lines into ranges of at least `unit_bytes` where possible: (first byte, byte after the last, first line).

    Every range starts at the start of a line; lines count from 1. The stream is read once, for the line numbers.
    """
    starts = [(0, 1)]
    offset, lines, target = 0, 0, unit_bytes
    while page := stream.read(_PAGE):
        cursor = 0
        while offset + len(page) >= target:
            end = page.find(b"\n", max(cursor, target - 1 - offset)) + 1
            if not end:
                break
            lines += page.count(b"\n", cursor, end)
            cursor = end
            starts.append((offset + end, lines + 1))
            target = offset + end + unit_bytes
        lines += page.count(b"\n", cursor)
        offset += len(page)
    starts = [start for start in starts if start[0] < offset]
    stops = [start for start, _ in starts[1:]] + [offset]
    return [(start, stop, line) for (start, line), stop in zip(starts, stops, strict=True)]


def read_lines(unit: InputUnit, largest: int, quarantine: Quarantine, tally: Tally) -> Iterator[Record]:
    """The records of JSON lines. A bad line, or one of more than `largest` bytes, costs itself; damaged compression
    costs the rest of the file. NUL bytes are dropped and counted: a crash leaves them, and no text has them."""
    codec = line_codec(unit["encoding"])
    file, name, source = unit["file"], unit["name"], unit["source"]
    text_field, id_field, url_field, time_field = (
        unit["text_field"], unit["id_field"], unit["url_field"], unit["time_field"])
    left = None if unit["start"] is None else unit["stop"] - unit["start"]
    line = unit["first"] - 1
    with open_file(file) as raw, decompressed(raw, unit["compression"], file) as stream:
        if unit["start"]:
            stream.seek(unit["start"])
        if unit["encoding"] not in CODECS:
            stream = as_utf8(stream, unit["encoding"])
        try:
            while (left is None or left > 0) and (found := read_line(stream, largest))[1]:
                data, size = found
                line += 1
                if left is not None:
                    left -= size
                if line == 1:
                    data = data.removeprefix(BOM)
                if nuls := data.count(b"\0"):
                    tally.left_out[NUL] += nuls
                if not (stripped := data.replace(b"\0", b"")).strip():
                    continue
                try:
                    check_size(size, largest, "the line")
                    values = parse_json(stripped, codec)
                    text = _text(values, text_field)
                except ValueError as error:
                    quarantine.put(file, line, str(error), data)
                    continue
                tally.encodings[unit["encoding"]] += 1
                own = as_label(values.get(id_field)) if id_field else None
                yield Record(own or f"{name}#{line}", as_label(values.get(url_field)) if url_field else None, text,
                             source, as_label(values.get(time_field)) if time_field else None, file, line)
        except broken_stream_errors() as error:
            quarantine.put(file, line + 1, describe_damage(error))


def _text(values: object, text_field: str) -> str:
    if not isinstance(values, dict):
        raise ValueError(f"not a JSON object but {type(values).__name__}")
    value = lookup(values, text_field)
    if value is MISSING:
        raise ValueError(f"no field {text_field!r}; its fields are {', '.join(map(repr, list(values)[:8])) or 'none'}")
    return checked_value(value, text_field)


def read_text(unit: InputUnit, largest: int, quarantine: Quarantine, tally: Tally) -> Iterator[Record]:
    """A plain text file as one record; damaged in any way, or of more than `largest` bytes, it is put aside whole."""
    file, encoding = unit["file"], unit["encoding"]
    with open_file(file) as raw, decompressed(raw, unit["compression"], file) as stream:
        try:
            data = stream.read(largest + 1).removeprefix(BOM)
        except broken_stream_errors() as error:
            quarantine.put(file, 1, describe_damage(error))
            return
    try:
        check_size(len(data), largest, "the file")
        text = checked_value(data.decode(CODECS.get(encoding, encoding)), "text")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        quarantine.put(file, line, f"invalid {encoding.upper()} at byte {error.start} of the file", data[error.start:])
    except ValueError as error:
        quarantine.put(file, 1, str(error), data)
    else:
        tally.encodings[encoding] += 1
        yield Record(f"{unit['name']}#1", None, text, unit["source"], None, file, 1)
