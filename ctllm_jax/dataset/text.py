"""Read text files as documents, one at a time, in a fixed order, and set unreadable records aside.

JSON lines (.jsonl, also .gz and .zst) and Parquet hold one document per record, in the field `text_field`; a .txt file
is one document. A folder means all such files below it, sorted by path.
"""

from __future__ import annotations

import codecs
import io
import json
import logging
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ctllm_jax.config.control import HALF, holds_surrogate
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.folders import Links, files_below

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
BOM = b"\xef\xbb\xbf"
LARGEST_LINE = 2**26
"""Largest size of a line of JSON in bytes: a line of more than 64 MiB is not a document."""
_COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
# UTF-32 before UTF-16, because UTF-16's mark is a prefix of UTF-32's.
_UNICODE_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
                  codecs.BOM_UTF16_BE: "utf-16"}
_SHOWN_BYTES = 2000
_CHUNK = 2**17
logger = logging.getLogger(__name__)


class Document(NamedTuple):
    """A text and its place: the line of a JSON lines file or the row of a Parquet file, from 1; 1 in a .txt."""

    text: str
    file: Path
    line: int


@dataclass
class Quarantine:
    """Sets bad records aside, as JSON lines {file, line, reason, raw}; more than `max_bad` raise a UserError.

    Without a path they are only counted.
    """

    path: Path | None
    max_bad: int
    count: int = 0

    def put(self, file: Path, line: int, reason: str, raw: bytes = b"") -> None:
        """Set one record aside. `raw` is its content, of which the first 2,000 bytes are kept."""
        self.count += 1
        listed = ""
        if self.path is not None:
            self._append(file, line, reason, raw)
            listed = f"; they are listed in {self.path}"
        if self.count > self.max_bad:
            raise UserError(f"{file}:{line}: {reason}. Bad records: {self.count}, allowed: max_bad={self.max_bad}"
                            f"{listed}")

    def _append(self, file: Path, line: int, reason: str, raw: bytes) -> None:
        entry = {"file": str(file), "line": line, "reason": reason,
                 "raw": raw[:_SHOWN_BYTES].decode("utf-8", errors="backslashreplace")}
        with open(self.path, "a", encoding="utf-8") as out:
            out.write(json.dumps(entry, ensure_ascii=False) + "\n")


def find_files(inputs: Sequence[str], *, links: Links = "follow") -> list[Path]:
    """Return the text files of `inputs` (files and folders), each once, in a fixed order.

    `links` states whether links below a folder are followed; a link that is itself an input always is.
    """
    found: dict[Path, Path] = {}
    for given in map(Path, inputs):
        if given.is_dir():
            below = files_below(given, links=links)
            taken = [path for path in below if path.name.endswith(SUFFIXES)]
            if not taken:
                raise UserError(f"input {given}: no file in this folder ends in {', '.join(SUFFIXES)}")
            if len(taken) < len(below):
                logger.warning("%s: %d files of other kinds are left out", given, len(below) - len(taken))
        elif not given.exists():
            raise UserError(f"input {given} does not exist")
        elif not given.name.endswith(SUFFIXES):
            raise UserError(f"input {given} must end in one of {', '.join(SUFFIXES)}")
        else:
            taken = [given]
        for path in taken:
            found.setdefault(path.resolve(), path)
    if not found:
        raise UserError("input is empty: give at least one file or folder")
    return list(found.values())


def read_documents(files: Sequence[Path], *, text_field: str, quarantine: Quarantine,
                   progress: Callable[[int], None] = lambda position: None) -> Iterator[Document]:
    """Yield all documents of `files`, in order. `progress` is called with the bytes read from disk."""
    before = 0
    for file in files:
        reader = _read_parquet if file.suffix == ".parquet" else _read_text if file.suffix == ".txt" else _read_lines
        for line, text, position in reader(file, text_field, quarantine):
            progress(before + position)
            yield Document(text, file, line)
        before += file.stat().st_size
        progress(before)


def checked_text(values: object, text_field: str) -> str:
    """Return the text of a parsed record. Raises ValueError that states the problem."""
    if not isinstance(values, dict):
        raise ValueError(f"not a JSON object but {type(values).__name__}")
    if text_field not in values:
        raise ValueError(f"no field {text_field!r}; its fields are {', '.join(map(repr, list(values)[:8])) or 'none'}")
    return checked_value(values[text_field], text_field)


def checked_value(text: object, text_field: str) -> str:
    """Return the value of a text field that UTF-8 can encode. Raises ValueError that states the problem."""
    if not isinstance(text, str):
        raise ValueError(f"field {text_field!r} is not text but {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"field {text_field!r} holds half of a surrogate pair at character {error.start}") from None
    return text


def _read_lines(file: Path, text_field: str, quarantine: Quarantine) -> Iterator[tuple[int, str, int]]:
    for line, values, data, position in read_json_lines(file, quarantine):
        try:
            text = checked_text(values, text_field)
        except ValueError as error:
            quarantine.put(file, line, str(error), data)
            continue
        yield line, text, position


def read_json_lines(file: Path, quarantine: Quarantine) -> Iterator[tuple[int, object, bytes, int]]:
    """Yield for each line of JSON its number, its value, its bytes, and the bytes of the file that were read.

    A bad line, or one of more than LARGEST_LINE bytes, is set aside; after damaged compression the rest of the file is
    lost.
    """
    with open(file, "rb") as raw, decompressed(raw, _COMPRESSIONS.get(file.suffix), str(file)) as stream:
        line = 0
        try:
            unicode = unicode_codec(stream.peek(4))
            lines = as_utf8(stream, unicode) if unicode else stream
            while (found := read_line(lines, LARGEST_LINE))[1]:
                data, size = found
                line += 1
                data = data.removeprefix(BOM) if line == 1 else data
                if not data.strip():
                    continue
                try:
                    if size > LARGEST_LINE:
                        raise ValueError(f"a line of {size:,} bytes; more than {LARGEST_LINE:,} are not read")
                    values = parse_json(data)
                except ValueError as error:
                    quarantine.put(file, line, str(error), data)
                    continue
                yield line, values, data, raw.tell()
        except broken_stream_errors() as error:
            quarantine.put(file, line + 1, describe_damage(error))


def unicode_codec(start: bytes) -> str | None:
    """Return utf-16 or utf-32 if the first bytes of a file are its byte order mark."""
    return next((name for mark, name in _UNICODE_MARKS.items() if start.startswith(mark)), None)


def as_utf8(stream: BinaryIO, encoding: str) -> BinaryIO:
    """Convert a stream of UTF-16 or UTF-32 to UTF-8. Invalid characters become bytes that are not UTF-8, so that their
    record is detected as bad."""
    return io.BufferedReader(_Transcoder(stream, encoding), buffer_size=2**20)


class _Transcoder(io.RawIOBase):
    """UTF-8 from another Unicode encoding, piece by piece."""

    def __init__(self, stream: BinaryIO, encoding: str):
        self._stream, self._ready, self._ended = stream, memoryview(b""), False
        self._decoder = codecs.getincrementaldecoder(encoding)(_NO_CHARACTER)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready and not self._ended:
            data = self._stream.read(_CHUNK)
            self._ended = not data
            text = self._decoder.decode(data, final=self._ended)
            self._ready = memoryview(text.encode("utf-8", "surrogatepass"))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


_NO_CHARACTER = "ctllm_jax.no_character"
codecs.register_error(_NO_CHARACTER, lambda error: ("\udfff", error.end))


def read_line(stream: BinaryIO, limit: int) -> tuple[bytes, int]:
    """Read the next line, truncated to `limit` bytes, and its length; empty and 0 at the end."""
    data = stream.readline(limit)
    size = len(data)
    if size == limit:
        last = data
        while not last.endswith(b"\n") and (last := stream.readline(_CHUNK)):
            size += len(last)
    return data, size


def parse_json(data: bytes, encoding: str = "utf-8") -> object:
    """Return the JSON value of a line of bytes. Raises ValueError that states the problem. `encoding` is Python's
    name."""
    try:
        return json.loads(data.decode(encoding))
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid {encoding.upper()} at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON at character {error.pos}: {error.msg}") from None
    except RecursionError:
        raise ValueError("malformed JSON: nested too deeply") from None


def json_lines(path: Path | str, *, key: str) -> Iterator[tuple[str, object]]:
    """Yield (FILE:LINE, value) for each non-blank line of a file. For files that fit into memory.

    Raises:
      UserError: the file cannot be read (the message names its config key), or a line is not JSON or contains half of a
        surrogate pair.
    """
    try:
        content = Path(path).read_bytes().removeprefix(BOM)
    except OSError as error:
        raise UserError(f"{key}={path} cannot be read: {error}") from None
    # Only a line feed ends a row, because JSON may contain U+2028 and similar characters unescaped.
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            try:
                value = parse_json(line)
                if holds_surrogate(value):
                    raise ValueError(f"a text holds {HALF}")
            except ValueError as error:
                raise UserError(f"{path}:{number}: {error}") from None
            yield f"{path}:{number}", value


def decompressed(raw: BinaryIO, compression: str | None, file: str) -> BinaryIO:
    """Open the decompressed bytes of an open file, whose `compression` is gz, zst or None; `file` is its name in
    errors.

    Reading on past damage raises one of `broken_stream_errors`.
    """
    if compression is None:
        return io.BufferedReader(raw, buffer_size=2**20)
    # gzip.GzipFile returns 8 kB at a time: 120 MB/s of JSON lines instead of 148.
    return io.BufferedReader(_FrameReader(raw, codec(compression, file)), buffer_size=2**20)


class Codec(NamedTuple):
    """How gz or zst is decompressed: a decompressor for a new member or frame, its magic bytes, the errors of damaged
    data, and the number of compressed bytes per call, which limits the output to 64 MiB."""

    new: Callable
    magic: bytes
    error: type[Exception]
    step: int


def codec(compression: str, file: str) -> Codec:
    """Return the codec of gz or zst; `file` is its name in errors. Raises UserError if the package is missing."""
    if compression == "gz":
        return Codec(lambda: zlib.decompressobj(zlib.MAX_WBITS | 16), b"\x1f\x8b\x08", zlib.error, 2**16)
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{file} needs the package zstandard: pip install 'ctllm-jax[prep]'") from None
    # A block of 4 bytes can expand to 128 KiB.
    return Codec(lambda: zstandard.ZstdDecompressor().decompressobj(), b"\x28\xb5\x2f\xfd", zstandard.ZstdError, 2**11)


class _FrameReader(io.RawIOBase):
    """Decompress the frames of a .zst file or the members of a .gz one in turn; each must be complete.

    zstandard's own reader does not detect a truncated file.
    """

    def __init__(self, raw: BinaryIO, form: Codec):
        self._raw, self._form = raw, form
        self._frame = None
        self._chunk, self._at = b"", 0
        self._ready = memoryview(b"")

    def _next(self) -> bytes:
        if self._at >= len(self._chunk):
            self._chunk, self._at = self._raw.read(_CHUNK), 0
        self._at += self._form.step
        return self._chunk[self._at - self._form.step:self._at]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            if self._frame is None or self._frame.eof:
                data = (self._frame.unused_data if self._frame else b"") or self._next()
                if not data.lstrip(b"\0"):  # Zeros may follow the last member (gzip -d ignores them too).
                    if not data:
                        return 0
                    self._frame = None
                    continue
                self._frame = self._form.new()
            elif not (data := self._next()):
                raise EOFError("its last part is not complete")
            self._ready = memoryview(self._frame.decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def broken_stream_errors() -> tuple[type[Exception], ...]:
    """The exceptions raised by reading a damaged compressed stream."""
    zstandard = sys.modules.get("zstandard")
    return (EOFError, zlib.error, *((zstandard.ZstdError,) if zstandard else ()))


def describe_damage(error: Exception) -> str:
    """What is wrong with a compressed stream, from the error of its decompressor."""
    if "too much memory" in str(error):
        return "its zstd window is larger than 128 MiB; compress it with zstd --long=27 or less"
    return f"the compressed data is damaged or ends early: {error}"


def _read_text(file: Path, text_field: str, quarantine: Quarantine) -> Iterator[tuple[int, str, int]]:
    del text_field
    data = file.read_bytes().removeprefix(BOM)
    encoding = unicode_codec(data) or "utf-8"
    try:
        yield 1, data.decode(encoding), len(data)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        quarantine.put(file, line, f"invalid {encoding.upper()} at byte {error.start} of the file", data[error.start:])


def _read_parquet(file: Path, text_field: str, quarantine: Quarantine) -> Iterator[tuple[int, str, int]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} needs the package pyarrow: pip install 'ctllm-jax[prep]'") from None
    size, row = file.stat().st_size, 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if text_field not in table.schema_arrow.names:
                names = ", ".join(map(repr, table.schema_arrow.names[:8]))
                quarantine.put(file, 1, f"no column {text_field!r}; its columns are {names}")
                return
            count = max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                # Arrow does not check that a text column is UTF-8: each value is decoded here, so that one bad value
                # costs one row.
                column = batch.column(0)
                if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                    column = column.cast(pyarrow.large_binary())
                for value in column.to_pylist():
                    row += 1
                    try:
                        text = value.decode("utf-8") if isinstance(value, bytes) else value
                        text = checked_text({text_field: text}, text_field)
                    except ValueError as error:
                        reason = "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
                        quarantine.put(file, row, reason, value if isinstance(value, bytes) else b"")
                        continue
                    yield row, text, size * row // count
    except (pyarrow.ArrowException, OSError) as error:
        quarantine.put(file, row + 1, f"the Parquet file is damaged: {error}")
