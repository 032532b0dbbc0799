"""Records of WARC files (ISO 28500), each by itself: what is damaged costs no record that is not.

Written here because the readers at hand stop at the first damaged gzip member, or take a cut record for a whole one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from ctllm_jax.dataset.text import Codec, codec, describe_damage

LARGEST = 2**26
"""Bytes of the largest record that is held; longer ones are no web pages."""
_CHUNK = 2**16
_LONGEST_HEAD = 2**16
_REREAD, _REREADS = 2**20, 64  # bytes of a damaged member in which the next one is searched; how often in a file
_VERSION = b"WARC/"
_BLANK_LINE = re.compile(rb"\r?\n\r?\n")


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
    number, lost, at = 1, False, 0
    place = "after decompression" if compression else "of the file"
    while True:
        try:
            if not source.skip_blank_lines():
                return
            at = source.offset
            if not source.starts_with(_VERSION):
                start = source.peek()
                found = source.skip_to_record()
                if not lost:
                    damaged(number, f"not the start of a WARC record, at byte {at:,} {place}", start)
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
        except (_Damage, ValueError, KeyError) as error:
            # A header that fails is taken off the buffer, so that every turn of the loop comes nearer to the end.
            if not lost:
                reason = str(error) if isinstance(error, _Damage) else f"malformed WARC header: {error}"
                damaged(number, f"{reason}, in the record at byte {at:,} {place}", source.peek())
                number += 1
            lost = True
            if isinstance(error, _Damage) and compression is not None:
                source.drop()
            continue
        lost = False
        yield WarcRecord(number, headers, block if keep else None)
        number += 1


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("utf-8", errors="replace").split("\n")
    pairs = (line.partition(":") for line in lines[1:] if ":" in line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


class _Source:
    """A buffer over pieces of bytes. A piece that is a _Damage is raised when reading reaches it."""

    def __init__(self, pieces: Iterator[bytes | _Damage]):
        self._pieces = pieces
        self._buffer = bytearray()
        self._filled = 0
        self._pending: _Damage | None = None

    def _fill(self) -> bool:
        piece = self._pending or next(self._pieces, None)
        self._pending = None
        if isinstance(piece, _Damage):
            raise piece
        if piece is not None:
            self._buffer += piece
            self._filled += len(piece)
        return piece is not None

    @property
    def offset(self) -> int:
        """The place of what comes next, in bytes."""
        return self._filled - len(self._buffer)

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

    def starts_with(self, prefix: bytes) -> bool:
        while len(self._buffer) < len(prefix) and self._fill():
            pass
        return self._buffer.startswith(prefix)

    def take_head(self) -> bytes:
        """The version line and header fields, up to the blank line. Line ends are CR LF, or LF as some tools write."""
        while True:
            # No further than the next record: a file of nothing but beginnings takes no longer than another.
            after = self._buffer.find(b"\n" + _VERSION, 0, _LONGEST_HEAD)
            if end := _BLANK_LINE.search(self._buffer, 0, after if after >= 0 else _LONGEST_HEAD):
                break
            if after >= 0 or len(self._buffer) >= _LONGEST_HEAD:
                del self._buffer[:len(_VERSION)]
                raise ValueError("it does not end")
            if not self._fill():
                del self._buffer[:len(_VERSION)]
                raise _Damage("the file ends inside a record's header")
        head = bytes(self._buffer[:end.start()])
        del self._buffer[:end.end()]
        return head

    def take(self, length: int, keep: bool) -> bytes:
        """The block of a record, or nothing without `keep`. A block up to LARGEST stays in the buffer until it is clear
        that the record ends where it should; ValueError where it does not."""
        left = length
        while len(self._buffer) < left:
            if length > LARGEST:
                left -= len(self._buffer)
                self._buffer.clear()
            if not self._fill():
                raise _Damage(f"the file ends {left - len(self._buffer):,} bytes before the end of a record")
        if not self._is_end(left):
            raise ValueError(f"no record ends where its length of {length:,} bytes says")
        taken = bytes(memoryview(self._buffer)[:left]) if keep else b""
        del self._buffer[:left]
        return taken

    def _is_end(self, at: int) -> bool:
        """Whether the input ends here, or a line or record does. Damage is left for the next record to find."""
        try:
            while len(self._buffer) < at + len(_VERSION) and self._fill():
                pass
        except _Damage as error:
            self._pending = error
        return len(self._buffer) == at or self._buffer[at] in b"\r\n" or self._buffer.startswith(_VERSION, at)

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
    form = codec(compression, file)
    member, data, left, rereads = None, b"", b"", 0
    fed = bytearray()  # what the member has been given; its first _REREAD bytes are kept
    while True:
        damage = None
        if not data and not left and not (left := raw.read(_CHUNK)):
            if member is None:
                return
            damage = "the compressed data ends early"
        if not data:
            data, left = left[:form.step], left[form.step:]
        if member is None:
            data = data.lstrip(b"\0")  # Padding after a member.
            if not data:
                continue
            member, fed = form.new(), bytearray()
        try:
            piece = member.decompress(data) if data else b""
        except form.error as error:
            piece, damage = b"", describe_damage(error)
        if piece:
            yield piece
        if damage:
            yield _Damage(damage)
            # A damaged member may be decompressed far into those after it before the damage shows.
            rereads += 1
            again = len(fed) <= _REREAD if rereads <= _REREADS else not fed
            left = _from_next_member(((bytes(fed) + data)[1:] if again else data) + left, raw, form)
            member, data = None, b""
        elif member.eof:
            member, data = None, member.unused_data
        else:
            fed += data if len(fed) <= _REREAD else b""
            data = b""


def _from_next_member(data: bytes, raw: BinaryIO, form: Codec) -> bytes:
    """The bytes from where a compressed member may begin, or none at the end of the file."""
    while (at := data.find(form.magic)) < 0:
        if not (chunk := raw.read(_CHUNK)):
            return b""
        data = data[-len(form.magic) + 1:] + chunk
    return data[at:]
