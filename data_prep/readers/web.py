"""WET and WARC to records: extracted text as it is, and the main text of web pages."""

from __future__ import annotations

from collections.abc import Iterator

from ctllm_jax.config.errors import UserError
from ctllm_jax.dataset.text import checked_value
from data_prep.readers import html
from data_prep.readers.files import open_file
from data_prep.readers.unit import InputUnit, Quarantine, Tally, check_size, time_limit
from data_prep.readers.warc import LARGEST, WarcRecord, warc_records
from data_prep.records import Record

_TYPES = ("conversion", "response")


def read_warc(unit: InputUnit, extractor: html.Extractor, largest: int, seconds: float, quarantine: Quarantine,
              tally: Tally) -> Iterator[Record]:
    """The conversion records (WET) and the responses with HTML (WARC) of a file; those of more than `largest` bytes, or
    that take more than `seconds` of CPU time, are bad.

    Records of other types, statuses, media types and codings are counted in `tally.left_out`. A page without main text
    is a record with an empty text.
    """
    file = unit["file"]
    with open_file(file) as raw:
        records = warc_records(
            raw, unit["compression"], file=file, wanted=lambda headers: headers.get("warc-type") in _TYPES,
            damaged=lambda number, reason, data: quarantine.put(file, number, reason, data))
        for record in records:
            kind = record.headers.get("warc-type")
            if record.block is None:
                tally.left_out[f"record larger than {LARGEST >> 20} MiB" if kind in _TYPES else
                               f"record of type {kind}"] += 1
                continue
            try:
                with time_limit(seconds):
                    text, encoding = (_conversion(record, largest) if kind == "conversion" else
                                      _page(record, extractor, largest))
                text = checked_value(text, "text")
            except UserError:
                raise  # A ValueError too, but of the machine and not of the record: a package is missing.
            except html.Left as reason:
                tally.left_out[str(reason)] += 1
                continue
            except ValueError as error:
                quarantine.put(file, record.number, str(error), record.block)
                continue
            tally.encodings[encoding] += 1
            own = record.headers.get("warc-record-id", "").strip("<>")
            yield Record(own or f"{unit['name']}#{record.number}", record.headers.get("warc-target-uri"), text,
                         unit["source"], record.headers.get("warc-date"), file, record.number)


def _conversion(record: WarcRecord, largest: int) -> tuple[str, str]:
    check_size(len(record.block), largest, "the record")
    try:
        return record.block.decode("utf-8"), "utf-8"
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start} of the record") from None


def _page(record: WarcRecord, extractor: html.Extractor, largest: int) -> tuple[str, str]:
    page, encoding = html.decode(html.parse_response(record.block, largest))
    return html.main_text(page, extractor), encoding
