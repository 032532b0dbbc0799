"""Records of WARC files (ISO 28500), each by itself: what is damaged costs no record that is not.

Written here because the readers at hand stop at the first damaged gzip member, or take a cut record for a whole one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from ctllm_jax.config.errors import UserError

LARGEST = 2**26
"""Bytes of the largest record that is held; longer ones are no web pages."""
_CHUNK = 2**16
_LONGEST_HEAD = 2**16
_VERSION = b"WARC/"
_GZIP, _ZSTD = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"


class WarcRecord(NamedTuple):
    """A record: its number in the file from 1, its header fields (lower-case names), and its block.

    `block` is None where it was not asked for, or is longer than LARGEST.
    """

    number: int
    headers: dict[str, str]
    block: bytes | None


class _Damage(Exception):
    """Bytes are missing or wrong; reading can go on after them unless the input has ended."""


def warc_records(raw: BinaryIO, compression: str | None, *, wanted: Callable[[dict[str, str]], bool],
                 damaged: Callable[[int, str, bytes], None], file: str) -> Iterator[WarcRecord]:
    """The records of a WARC file, compressed record by record, as a whole, or not at all.

    `wanted` says from its headers whether a record's block is kept. `damaged` is told of each place that could not be
    read: record number, what is wrong, the bytes there. Reading goes on at the next compressed member, or at the next
    line that begins a record.
    """
    source = _Source(_expanded(raw, compression, file))
    number, lost = 1, False
    while True:
        try:
            if not source.skip_blank_lines():
                return
            if not source.starts_with(_VERSION):
                start = source.peek()
                found = source.skip_to_record()
                if not lost:
                    damaged(number, "not the start of a WARC record", start)
                    number += 1
                lost = True
                if not found:
                    return
                continue
            headers = _headers(source.take_head())
            length = int(headers["content-length"])
            if length < 0:
                raise ValueError("negative length")
            keep = length <= LARGEST and wanted(headers)
            block = source.take(length, keep)
            if not source.is_between_records():
                source.put_back(block)
                raise ValueError(f"no record ends where its length of {length:,} bytes says")
        except (_Damage, ValueError, KeyError) as error:
            if not lost:
                reason = str(error) if isinstance(error, _Damage) else f"malformed WARC header: {error}"
                damaged(number, reason, source.peek())
                number += 1
            lost = True
            if isinstance(error, _Damage) and compression is not None:
                source.drop()
            continue
        lost = False
        yield WarcRecord(number, headers, block if keep else None)
        number += 1


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("utf-8", errors="replace").splitlines()
    pairs = (line.partition(":") for line in lines[1:] if ":" in line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


class _Source:
    """A buffer over pieces of bytes. A piece that is a _Damage is raised when reading reaches it."""

    def __init__(self, pieces: Iterator[bytes | _Damage]):
        self._pieces = pieces
        self._buffer = bytearray()
        self._pending: _Damage | None = None

    def _fill(self) -> bool:
        piece = self._pending or next(self._pieces, None)
        self._pending = None
        if isinstance(piece, _Damage):
            raise piece
        if piece is not None:
            self._buffer += piece
        return piece is not None

    def peek(self) -> bytes:
        return bytes(self._buffer[:2000])

    def drop(self) -> None:
        """Forget what has been read: it belongs to a record that is not whole."""
        self._buffer.clear()

    def skip_blank_lines(self) -> bool:
        """Whether anything follows."""
        while self._buffer or self._fill():
            if self._buffer[0] not in b"\r\n":
                return True
            del self._buffer[0]
        return False

    def is_between_records(self) -> bool:
        """Whether the input ends here, or a line or record does. Damage is left for the next record to find."""
        try:
            while len(self._buffer) < len(_VERSION) and self._fill():
                pass
        except _Damage as error:
            self._pending = error
        return not self._buffer or self._buffer[0] in b"\r\n" or self._buffer.startswith(_VERSION)

    def put_back(self, data: bytes) -> None:
        self._buffer[:0] = data

    def starts_with(self, prefix: bytes) -> bool:
        while len(self._buffer) < len(prefix) and self._fill():
            pass
        return self._buffer.startswith(prefix)

    def take_head(self) -> bytes:
        """The version line and header fields, up to the blank line."""
        searched = 0
        while (end := self._buffer.find(b"\r\n\r\n", searched)) < 0:
            if len(self._buffer) > _LONGEST_HEAD:
                del self._buffer[:len(_VERSION)]
                raise ValueError("it does not end")
            searched = max(0, len(self._buffer) - 3)
            if not self._fill():
                raise _Damage("the file ends inside a record's header")
        head = bytes(self._buffer[:end])
        del self._buffer[:end + 4]
        return head

    def take(self, length: int, keep: bool) -> bytes:
        """The next bytes; without `keep` they are passed over and nothing is returned."""
        while len(self._buffer) < length:
            if not keep:
                length -= len(self._buffer)
                self._buffer.clear()
            if not self._fill():
                raise _Damage(f"the file ends {length - len(self._buffer):,} bytes before the end of a record")
        taken = bytes(memoryview(self._buffer)[:length]) if keep else b""
        del self._buffer[:length]
        return taken

    def skip_to_record(self) -> bool:
        """Go to the next line that begins a record; whether there is one."""
        while (at := self._buffer.find(b"\n" + _VERSION)) < 0:
            del self._buffer[:max(0, len(self._buffer) - len(_VERSION))]
            if not self._fill():
                return False
        del self._buffer[:at + 1]
        return True


def _expanded(raw: BinaryIO, compression: str | None, file: str) -> Iterator[bytes | _Damage]:
    """The decompressed bytes, a _Damage in the place of what cannot be."""
    if compression is None:
        while chunk := raw.read(_CHUNK):
            yield chunk
        return
    new, magic, errors = _codec(compression, file)
    member, data = None, b""
    while True:
        if not data and not (data := raw.read(_CHUNK)):
            if member is not None:
                yield _Damage("the compressed data ends early")
            return
        begins_here = member is None
        if begins_here:
            if not data.strip(b"\0"):
                data = b""  # Padding after the last member.
                continue
            member = new()
        try:
            piece = member.decompress(data)
        except errors as error:
            yield _Damage(f"the compressed data is damaged: {error}")
            member, data = None, _from_next_member(data[1:] if begins_here else data, raw, magic)
            continue
        if piece:
            yield piece
        if member.eof:
            member, data = None, member.unused_data
        else:
            data = b""


def _from_next_member(data: bytes, raw: BinaryIO, magic: bytes) -> bytes:
    """The bytes from where a compressed member may begin, or none at the end of the file."""
    while (at := data.find(magic)) < 0:
        chunk = raw.read(_CHUNK)
        if not chunk:
            return b""
        data = data[-len(magic) + 1:] + chunk
    return data[at:]


def _codec(compression: str, file: str):
    if compression == "gz":
        return lambda: zlib.decompressobj(zlib.MAX_WBITS | 16), _GZIP, zlib.error
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{file} needs the package zstandard: pip install 'ctllm-jax[prep]'") from None
    return lambda: zstandard.ZstdDecompressor().decompressobj(), _ZSTD, zstandard.ZstdError
