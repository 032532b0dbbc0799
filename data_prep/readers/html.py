"""HTTP responses to the main text of their HTML."""

from __future__ import annotations

import re
import zlib
from typing import Literal, NamedTuple

from ctllm_jax.config.errors import UserError
from ctllm_jax.dataset import text
from data_prep.readers.nesting import check_nesting
from data_prep.readers.unit import check_size

Extractor = Literal["resiliparse", "trafilatura"]

_HTML_TYPES = ("text/html", "application/xhtml+xml")
_META_BYTES = 1024
_STEP = 2**12
_NO_CODING = ("", "identity", "none", "utf-8", "chunked")
_TAG = re.compile(rb"(\xef\xbb\xbf)?\s*<[!?/a-zA-Z]")
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_LATIN = "cp1252"
# WHATWG names to the widest of a family: pages that call themselves gb2312 use GBK's characters, and GB18030 holds all.
_FAMILIES = {"gbk": ("gb18030", "gb18030"), "gb18030": ("gb18030", "gb18030"), "big5": ("big5", "big5hkscs")}


class Left(Exception):
    """A response that is no page to be read; says why, in words that can be counted."""


class Response(NamedTuple):
    """The body of an HTTP response, as it was before transfer, and the charset of its header if it names one."""

    body: bytes
    charset: str | None


def parse_response(block: bytes, largest: int) -> Response:
    """An HTTP response with HTML. Left for other kinds, statuses and codings; ValueError where it is malformed, or its
    body has more than `largest` bytes."""
    head, blank, body = block.partition(b"\r\n\r\n")
    if not blank:
        head, blank, body = block.partition(b"\n\n")
    lines = head.decode("latin-1").splitlines()
    status = lines[0].split(maxsplit=2) if lines else []
    if not blank or len(status) < 2 or not status[0].startswith("HTTP/"):
        raise ValueError("malformed HTTP response: no status line and header")
    fields = [(name.strip().lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines[1:])]
    if status[1] != "200":
        raise Left(f"HTTP status {status[1][:3]}")
    kind, *parameters = (part.strip() for part in dict(fields).get("content-type", "").split(";"))
    if kind.lower() not in _HTML_TYPES:
        raise Left(f"HTTP type {kind.lower()[:60] or 'not given'}")
    charset = next((value.strip("\"' ") for name, _, value in (part.partition("=") for part in parameters)
                    if name.strip().lower() == "charset"), None)
    # Of several headers of one name the values follow one another, as in a list with commas.
    transfer, content = (",".join(value for name, value in fields if name == wanted).lower().replace(" ", "").split(",")
                         for wanted in ("transfer-encoding", "content-encoding"))
    # Crawlers that undo a transfer often leave its header: chunks are undone only where they are there.
    if "chunked" in transfer:
        body = _without_chunks(body)
    return Response(_without_codings(body, content + transfer, largest), charset)


def _without_chunks(body: bytes) -> bytes:
    pieces, at = [], 0
    while True:
        end = body.find(b"\r\n", at)
        try:
            size = int(body[at:end].split(b";")[0], 16) if end >= 0 else -1
        except ValueError:
            size = -1
        if size < 0:
            return body if at == 0 else b"".join(pieces)
        pieces.append(body[end + 2:end + 2 + size])
        if not size:
            return b"".join(pieces)
        at = end + 4 + size


def _without_codings(body: bytes, codings: list[str], largest: int) -> bytes:
    """The body before its codings, which are undone from the last; Left for one that is unknown here."""
    for coding in reversed(codings):
        # Crawlers that undo a coding often leave its header: it is undone only where it is there.
        if coding in _NO_CODING or _is_text(body):
            continue
        if coding in ("gzip", "x-gzip"):
            body = _inflate(body, zlib.MAX_WBITS | 16, largest)
        elif coding == "deflate":
            body = _inflate(body, zlib.MAX_WBITS if body[:1] == b"\x78" else -zlib.MAX_WBITS, largest)
        elif coding == "zstd":
            body = _from_zstd(body, largest)
        elif coding == "br":
            body = _from_brotli(body, largest)
        else:
            raise Left(f"HTTP coding {coding[:60]}")
    return body


def _is_text(body: bytes) -> bool:
    """Whether these bytes are text as it is: compressed data has control characters among its first bytes, or, where it
    is short, is not UTF-8."""
    start = body[:_META_BYTES]
    if _TAG.match(start) or start[:4] in (b"\xff\xfe<\0", b"\xfe\xff\0<") or not start:
        return True
    if _CONTROLS.search(start):
        return False
    try:
        return len(start) >= 256 or bool(start.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _inflate(body: bytes, bits: int, largest: int) -> bytes:
    """All members of gzip, or a deflate stream. A page that a crawler's size limit has cut still has its beginning."""
    pieces, left, at, stream = [], largest + 1, 0, zlib.decompressobj(bits)
    while at < len(body) and left > 0:
        if stream.eof:
            if bits <= zlib.MAX_WBITS or not body.startswith(b"\x1f\x8b", at):
                break  # Padding, or a line end, after the last member.
            stream = zlib.decompressobj(bits)
        data = body[at:at + _STEP]  # After each member zlib copies what is left of its input.
        try:
            pieces.append(stream.decompress(data, left))
        except zlib.error as error:
            raise ValueError(f"the compressed body is damaged: {error}") from None
        left -= len(pieces[-1])
        at += len(data) - len(stream.unused_data)
    return _whole(pieces, largest)


def _from_zstd(body: bytes, largest: int) -> bytes:
    form, frame, pieces, size = text.codec("zst", "a WARC with bodies in zstd"), None, [], 0
    for start in range(0, len(body), form.step):
        data = body[start:start + form.step]
        while data and size <= largest:
            frame = form.new() if frame is None or frame.eof else frame
            try:
                pieces.append(frame.decompress(data))
            except form.error as error:
                raise ValueError(f"the compressed body is damaged: {error}") from None
            size += len(pieces[-1])
            data = frame.unused_data
    return _whole(pieces, largest)


def _from_brotli(body: bytes, largest: int) -> bytes:
    try:
        import brotli
    except ImportError:
        raise Left("HTTP coding br") from None
    if not hasattr(brotli.Decompressor, "can_accept_more_data"):
        raise Left("HTTP coding br")  # Before 1.2 nothing limits what a few bytes expand to.
    stream, pieces, left = brotli.Decompressor(), [], largest + 1
    try:
        pieces.append(stream.process(body, output_buffer_limit=left))
        while pieces[-1] and len(pieces[-1]) < left and not stream.is_finished():
            left -= len(pieces[-1])
            pieces.append(stream.process(b"", output_buffer_limit=left))
    except brotli.error as error:
        raise ValueError(f"the compressed body is damaged: {error}") from None
    return _whole(pieces, largest)


def _whole(pieces: list[bytes], largest: int) -> bytes:
    check_size(sum(map(len, pieces)), largest, "the body, decompressed,")
    return b"".join(pieces)


def decode(response: Response) -> tuple[str, str]:
    """The HTML as text, and the name of its encoding.

    Valid UTF-8 is UTF-8 whatever is claimed, since other text almost never is; else the first that fits of byte order
    mark, HTTP header, meta tag and detection. Where none fits the whole page, bad bytes become U+FFFD, as in a browser.
    """
    body = response.body
    candidates = [("utf-8", "utf-8-sig"), *_candidates(response)]
    for name, codec in candidates:
        try:
            return body.decode(codec), name
        except UnicodeDecodeError:
            continue
    name, codec = candidates[1] if len(candidates) > 1 else candidates[0]
    return body.decode(codec, errors="replace"), name


def _candidates(response: Response):
    encoding = _resiliparse("encoding")
    body = response.body
    if body.startswith((b"\xff\xfe", b"\xfe\xff")):
        yield "utf-16", "utf-16"
    named = [encoding.map_encoding_to_html5(label, False) for label in
             (response.charset, _declared(encoding, body[:_META_BYTES]), encoding.detect_encoding(body)) if label]
    # Latin-1 is what many servers claim of every page, and any bytes fit it: the last to be believed.
    for name in sorted(filter(None, named), key=lambda name: name == _LATIN):
        yield _FAMILIES.get(name, (name, name))


def _declared(encoding, head: bytes) -> str | None:
    """The charset of a meta tag, if there is one."""
    # What is not ASCII is left out, so that without a tag the answer is ascii and no guess.
    tags = bytes(byte for byte in head if byte < 0x80)
    found = encoding.detect_encoding(tags, from_html_meta=True, html5_compatible=False)
    return None if found == "ascii" else found


def _resiliparse(module: str):
    try:
        if module == "encoding":
            from resiliparse.parse import encoding

            return encoding
        from resiliparse.extract import html2text

        return html2text
    except ImportError:
        raise UserError("WARC files need the package resiliparse: pip install 'ctllm-jax[prep]'") from None


def main_text(html: str, extractor: Extractor) -> str:
    """The main text of a page, a line a block; empty where there is none. ValueError where it cannot be parsed, or its
    tags nest too deeply."""
    check_nesting(html, extractor)
    if extractor == "resiliparse":
        # Without bullets: a filter that counts lines with bullets is to see the page's own.
        extract, options = _resiliparse("extract").extract_plain_text, {
            "main_content": True, "preserve_formatting": True, "list_bullets": False, "alt_texts": False}
    else:
        try:
            from trafilatura import extract
        except ImportError as error:
            raise UserError(f"html=trafilatura needs the package trafilatura: pip install 'ctllm-jax[prep]' ({error})"
                            ) from None
        options = {"include_comments": False, "deduplicate": False}
    try:
        return extract(html, **options) or ""
    except Exception as error:  # noqa: BLE001 - a parser's own errors, whatever they are, cost one page.
        raise ValueError(f"{extractor} cannot parse the page: {error}") from None
