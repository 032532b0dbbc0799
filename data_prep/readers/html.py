"""HTTP responses to the main text of their HTML."""

from __future__ import annotations

import zlib
from typing import Literal, NamedTuple

from ctllm_jax.config.errors import UserError

Extractor = Literal["resiliparse", "trafilatura"]

_HTML_TYPES = ("text/html", "application/xhtml+xml")
_META_BYTES = 1024
_LATIN = "cp1252"
_MOST_EXPANDED = 2**26
# WHATWG names to the widest of a family: pages that call themselves gb2312 use GBK's characters, and GB18030 holds all.
_FAMILIES = {"gbk": ("gb18030", "gb18030"), "gb18030": ("gb18030", "gb18030"), "big5": ("big5", "big5hkscs")}


class Left(Exception):
    """A response that is no page to be read; says why, in words that can be counted."""


class Response(NamedTuple):
    """The body of an HTTP response, as it was before transfer, and the charset of its header if it names one."""

    body: bytes
    charset: str | None


def parse_response(block: bytes) -> Response:
    """An HTTP response with HTML. Left for other kinds and statuses; ValueError where it is malformed."""
    head, blank, body = block.partition(b"\r\n\r\n")
    if not blank:
        head, blank, body = block.partition(b"\n\n")
    lines = head.decode("latin-1").splitlines()
    status = lines[0].split(maxsplit=2) if lines else []
    if not blank or len(status) < 2 or not status[0].startswith("HTTP/"):
        raise ValueError("malformed HTTP response: no status line and header")
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if status[1] != "200":
        raise Left(f"HTTP status {status[1][:3]}")
    kind, *parameters = (part.strip() for part in fields.get("content-type", "").split(";"))
    if kind.lower() not in _HTML_TYPES:
        raise Left(f"HTTP type {kind.lower()[:60] or 'not given'}")
    charset = next((value.strip("\"' ") for name, _, value in (part.partition("=") for part in parameters)
                    if name.strip().lower() == "charset"), None)
    # Crawlers that undo a transfer often leave its header: chunks are undone only where they are there.
    if "chunked" in fields.get("transfer-encoding", "").lower():
        body = _without_chunks(body)
    return Response(_without_coding(body, fields.get("content-encoding", "").lower()), charset)


def _without_chunks(body: bytes) -> bytes:
    pieces, at = [], 0
    while True:
        end = body.find(b"\r\n", at)
        try:
            size = int(body[at:end].split(b";")[0], 16)
        except ValueError:
            return body if at == 0 else b"".join(pieces)
        pieces.append(body[end + 2:end + 2 + size])
        if not size:
            return b"".join(pieces)
        at = end + 4 + size


def _without_coding(body: bytes, coding: str) -> bytes:
    if coding in ("gzip", "x-gzip") and body.startswith(b"\x1f\x8b"):
        return _inflate(body, zlib.MAX_WBITS | 16)
    if coding == "deflate" and not body.lstrip().startswith(b"<"):
        return _inflate(body, zlib.MAX_WBITS if body[:1] == b"\x78" else -zlib.MAX_WBITS)
    if coding in ("br", "zstd") and b"<" not in body[:_META_BYTES]:
        raise Left(f"HTTP coding {coding}")
    return body


def _inflate(body: bytes, bits: int) -> bytes:
    try:
        # A page cut by the crawler's size limit still has its beginning.
        return zlib.decompressobj(bits).decompress(body, _MOST_EXPANDED)
    except zlib.error as error:
        raise ValueError(f"the compressed body is damaged: {error}") from None


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
    """The main text of a page, a line a block; empty where there is none. ValueError where it cannot be parsed."""
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
