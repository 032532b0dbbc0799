"""Clean the deduplicated documents: drop similar lines, and documents with evaluation text."""

from __future__ import annotations

import functools
import hashlib
import json
from typing import TYPE_CHECKING, Any

from data_prep.commits import Output, Unit
from data_prep.stages.common import SHOWN_CHARACTERS, config_of, lowest, read_part, run_unit

if TYPE_CHECKING:
    from data_prep.dedup.decontaminate import NgramSet

VERSION = 4
COLUMNS = ("id", "url", "text", "source", "time")


@functools.lru_cache(maxsize=1)
def evaluation_text(files: tuple[str, ...], ngram: int) -> NgramSet:
    """The n-grams of the evaluation sets; read once in a process."""
    from data_prep.dedup.decontaminate import load

    return load(list(files), ngram=ngram)


def run(unit: Unit, options: dict[str, Any]) -> dict[str, Any]:
    """Clean the documents at `unit["location"]` that are not in `unit["dropped"]`; write them as .jsonl.zst."""
    return run_unit(unit, options, _clean)


def _clean(unit: Unit, options: dict[str, Any], output: Output) -> None:
    import zstandard

    from data_prep.dedup.similar_lines import drop_similar_lines

    config = config_of(options)
    part = read_part(unit["location"], COLUMNS, without=unit["dropped"])
    files, limit = tuple(config.decontaminate.files), config.decontaminate.max_matches
    known = evaluation_text(files, config.decontaminate.ngram) if files else None
    lines = documents_with_lines = characters = 0
    kept: list[bytes] = []
    kept_bytes = in_bytes = 0
    line_pairs: list[dict[str, Any]] = []
    contaminated: list[dict[str, Any]] = []
    stay: list[dict[str, Any]] = []
    for record in zip(*(part[name] for name in COLUMNS), strict=True):
        values = dict(zip(COLUMNS, record, strict=True))
        in_bytes += len(values["text"].encode("utf-8"))
        passages = known.passages(values["text"]) if known else []
        if len(passages) > limit:
            contaminated.append({"order": f"{len(passages):08d}", "id": values["id"], "url": values["url"],
                                 "value": len(passages), "text": values["text"][:SHOWN_CHARACTERS],
                                 "passage": max(passages, key=len)[:SHOWN_CHARACTERS]})
            continue
        if unit["similar_lines"]:
            values["text"], dropped, shorter, pairs = drop_similar_lines(values["text"], config.lines)
            line_pairs = lowest(line_pairs + [
                {"order": hashlib.blake2b(gone.encode(), digest_size=8).hexdigest(), "id": values["id"],
                 "url": values["url"], "text": gone, "other": other} for gone, other in pairs], config.filter.samples)
            lines, characters = lines + dropped, characters + shorter
            documents_with_lines += dropped > 0
        text = values["text"].encode("utf-8")
        kept_bytes += len(text)
        stay.append({"order": hashlib.blake2b(text, digest_size=16).hexdigest(), "id": values["id"],
                     "url": values["url"], "text": values["text"][:SHOWN_CHARACTERS]})
        if len(stay) >= 4 * max(1, config.filter.samples):
            stay = lowest(stay, config.filter.samples)
        kept.append(json.dumps(values, ensure_ascii=False).encode("utf-8"))
    if kept:
        data = zstandard.ZstdCompressor(level=3).compress(b"\n".join(kept) + b"\n")
        output.file(f"{unit['source']}/{unit['id']}.jsonl.zst").write_bytes(data)
    output.counters |= {"in": len(part["id"]), "in_bytes": in_bytes, "kept": len(kept), "kept_bytes": kept_bytes,
                        "contaminated": len(contaminated), "ngrams": len(known) if known else 0,
                        "samples": lowest(contaminated, config.filter.samples),
                        "line_pairs": line_pairs,
                        "stay": lowest(stay, config.filter.samples),
                        "documents_with_lines": documents_with_lines, "lines": lines, "characters": characters}
