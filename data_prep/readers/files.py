"""Input files, local or of an object store: finding, opening, and recognising what they hold."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.folders import Links, files_below
from ctllm_jax.dataset.text import BOM, broken_stream_errors, decompressed, unicode_codec
from data_prep.readers.encodings import CODECS

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet", ".txt": "text",
         ".wet": "wet", ".warc": "warc"}
_PACKED = {".gz": "gz", ".zst": "zst"}
_BY_CONTENT = ("", ".json")
"""Suffixes that do not tell the kind: Spark's part-00000 has none, and .json may be JSON lines."""
HEAD_BYTES = 2**16
_ASCII_BYTES = 2**20


class InputFile(NamedTuple):
    """A file of the input. `name` is its path below the folder that was given; `explicit`: it was given itself."""

    file: str
    name: str
    size: int
    explicit: bool


class Recognised(NamedTuple):
    """What a file holds: kind (jsonl, parquet, text, wet, warc; None: unknown), compression (gz, zst, None), the first
    bytes, decompressed, whether content and suffix disagree, and the encoding if the file begins with the mark of
    UTF-16 or UTF-32; `head` is UTF-8 then."""

    kind: str | None
    compression: str | None
    head: bytes
    contradicts: bool
    unicode: str | None


def is_remote(path: str) -> bool:
    """Whether fsspec opens this, not the operating system: gs://, s3://, memory://, …"""
    return "://" in path


def open_file(file: str) -> BinaryIO:
    """A file for reading at any place. OSError where it cannot be opened."""
    if not is_remote(file):
        return open(file, "rb")
    system, path = _file_system(file)
    return system.open(path, "rb")


def _file_system(url: str):
    protocol = url.partition("://")[0]
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = "gcs" if protocol in ("gs", "gcs") else "prep"
        raise UserError(f"{url} needs a package that is not installed: pip install 'ctllm-jax[{extra}]' ({error})"
                        ) from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None


def list_files(inputs: Sequence[str], *, links: Links = "follow") -> list[InputFile]:
    """The files that `inputs` (files and folders) stand for, each once, sorted within a folder; hidden ones are not.

    `links` says whether links below a local folder are followed; one that was given itself always is. Names are
    distinct: where two folders hold the same one, the folder's name, and where that is not enough its whole
    path, stands before it. UserError for an input that does not exist.
    """
    found: dict[str, tuple[str, InputFile]] = {}
    for given in (given.removeprefix("file://") for given in inputs):
        root, files = _below(given) if is_remote(given) else _below_local(given, links)
        for file in files:
            identity = file.file if is_remote(given) else str(Path(file.file).resolve())
            found.setdefault(identity, (root, file))
    named = list(found.values())
    for _, file in named:
        if not file.file.isprintable() and any("\ud800" <= character <= "\udfff" for character in file.file):
            raise UserError(f"input {os.fsencode(file.file)!r}: the name of this file is not UTF-8; rename it")
    for prefix in (lambda root: PurePosixPath(root.rstrip("/")).name, lambda root: root.rstrip("/")):
        counts: dict[str, int] = {}
        for _, file in named:
            counts[file.name] = counts.get(file.name, 0) + 1
        named = [(root, file if counts[file.name] == 1 else file._replace(name=f"{prefix(root)}/{_own(root, file)}"))
                 for root, file in named]
    return [file for _, file in named]


def _own(root: str, file: InputFile) -> str:
    """The path below the root, whatever name the file has by now."""
    return file.file.removeprefix(root.rstrip("/")).lstrip("/")


def _below_local(given: str, links: Links) -> tuple[str, list[InputFile]]:
    path = Path(given)
    if path.is_dir():
        return str(path), [InputFile(str(file), file.relative_to(path).as_posix(), file.stat().st_size, False)
                           for file in files_below(path, links=links) if not _is_hidden(file.relative_to(path))]
    if not path.exists():
        raise UserError(f"input {given} does not exist")
    return str(path.parent), [InputFile(str(path), path.name, path.stat().st_size, True)]


def _below(given: str) -> tuple[str, list[InputFile]]:
    system, root = _file_system(given)
    root = root.rstrip("/")
    try:
        if system.isfile(root):
            return (system.unstrip_protocol(root.rpartition("/")[0]),
                    [InputFile(system.unstrip_protocol(root), PurePosixPath(root).name, system.size(root), True)])
        found = system.find(root, detail=True)
    except FileNotFoundError:
        found = {}
    except OSError as error:
        raise UserError(f"input {given} cannot be listed: {error}") from error
    if not found:
        raise UserError(f"input {given} does not exist, or is an empty folder")
    files = [(PurePosixPath(path.removeprefix(root).lstrip("/")), path, entry) for path, entry in found.items()]
    return (system.unstrip_protocol(root),
            [InputFile(system.unstrip_protocol(path), str(name), int(entry["size"]), False)
             for name, path, entry in sorted(files, key=lambda item: item[0]) if not _is_hidden(name)])


def _is_hidden(relative: PurePosixPath | Path) -> bool:
    return any(part.startswith((".", "_SUCCESS")) for part in relative.parts)


def suffix_of(name: str) -> str:
    """The suffix that tells the kind: of a.warc.wet.gz, .wet."""
    path = PurePosixPath(name.lower())
    return PurePosixPath(path.stem).suffix if path.suffix in _PACKED else path.suffix


def may_be_read(file: InputFile) -> bool:
    """Whether it is worth opening: the suffix is known, says nothing, or the user gave this very file."""
    return file.explicit or suffix_of(file.name) in KINDS or suffix_of(file.name) in _BY_CONTENT


def recognise(file: InputFile) -> Recognised:
    """What a file holds, by its content first and its suffix second. OSError where it cannot be opened.

    Parquet, WARC and JSON lines are known by their first bytes; plain text only by its suffix.
    """
    with open_file(file.file) as raw:
        start = raw.read(4)
        raw.seek(0)
        compression = "gz" if start[:2] == b"\x1f\x8b" else "zst" if _is_zstd(start) else None
        head = _head(raw, compression, file.file)
    if unicode := unicode_codec(head):
        head = head.decode(unicode, "ignore").encode("utf-8")
    suffix = suffix_of(file.name)
    by_suffix, by_content = KINDS.get(suffix), _kind_of(head, suffix)
    contradicts = bool(by_content and by_suffix and {by_content, by_suffix} != {"wet", "warc"}
                       and by_content != by_suffix)
    packed = _PACKED.get(PurePosixPath(file.name.lower()).suffix)
    return Recognised(by_content or by_suffix, compression, head, contradicts or (packed != compression), unicode)


def _is_zstd(start: bytes) -> bool:
    # The second is a skippable frame (RFC 8878, 3.1.2), with which some tools begin.
    return start == b"\x28\xb5\x2f\xfd" or start[1:] == b"\x2a\x4d\x18" and start[0] & 0xF0 == 0x50


def _head(raw: BinaryIO, compression: str | None, file: str) -> bytes:
    """The first bytes, decompressed; more of them where they are all ASCII, so that an encoding shows."""
    head = bytearray()
    with decompressed(raw, compression, file) as stream:
        try:
            while len(head) < HEAD_BYTES or head.isascii() and len(head) < _ASCII_BYTES:
                piece = stream.read1(HEAD_BYTES)
                if not piece:
                    break
                head += piece
                if head.startswith((b"PAR1", b"WARC/")) and len(head) >= HEAD_BYTES:
                    break
        except broken_stream_errors():
            pass  # What came before the damage is what there is to look at.
    return bytes(head)


def _kind_of(head: bytes, suffix: str) -> str | None:
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"WARC/"):
        return "wet" if suffix == ".wet" or b"WARC-Type: conversion" in head else "warc"
    first = next((line for line in io.BytesIO(head.removeprefix(BOM)) if line.strip()), b"")
    if first.lstrip().startswith(b"{"):
        whole = first.endswith(b"\n") or len(head) < HEAD_BYTES
        if any(_is_object(first, codec) for codec in CODECS.values()) if whole else first.startswith(b'{"'):
            return "jsonl"
    return None


def _is_object(line: bytes, codec: str) -> bool:
    try:
        return isinstance(json.loads(line.decode(codec)), dict)
    except (ValueError, RecursionError):
        return False
