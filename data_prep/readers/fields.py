"""Which fields of a record hold its text, id, address and date."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

TEXT_FIELDS = ("text", "content", "raw_content", "contents", "body", "article", "正文", "内容", "passage", "document",
               "full_text")
ID_FIELDS = ("id", "docid", "doc_id", "document_id", "uuid", "_id", "warc_record_id", "WARC-Record-ID")
URL_FIELDS = ("url", "uri", "source_url", "link", "href", "WARC-Target-URI")
TIME_FIELDS = ("timestamp", "time", "date", "publish_time", "published", "crawl_time", "date_download", "WARC-Date")

MISSING = object()


def lookup(values: Mapping, name: str) -> object:
    """The value of a field, or MISSING; a.b is the field of that name, else b within a."""
    if name in values:
        return values[name]
    for part in name.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return MISSING
        values = values[part]
    return values


def text_candidates(samples: Iterable[Mapping]) -> list[str]:
    """The known names that may be these records' text: those of a record that has text under several, else the one
    that most records have."""
    present = [[name for name in TEXT_FIELDS if isinstance(values.get(name), str) and values[name]]
               for values in samples]
    together = {name for names in present if len(names) > 1 for name in names}
    if together:
        return [name for name in TEXT_FIELDS if name in together]
    return [name for name, _ in Counter(name for names in present for name in names).most_common(1)]


def first_known(names: Sequence[str], fields: Iterable[str]) -> str | None:
    """The first of `names` that is a field, or None."""
    fields = set(fields)
    return next((name for name in names if name in fields), None)


def as_label(value: object) -> str | None:
    """An id, address or date as text, or None where the value is none: text, a whole number, a date or time."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, str):
        # A surrogate half in an address is no reason to lose the text; no file could hold it.
        return value.encode("utf-8", errors="replace").decode() or None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None
