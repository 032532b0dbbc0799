"""Filter parts of records by the rules; the output parts have the measured values of every rule."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from ctllm_jax.config.prepare import FilterConfig
from data_prep.commits import Output, Unit
from data_prep.stages.common import SHOWN_CHARACTERS, config_of, lowest, read_part, run_unit, write_part

if TYPE_CHECKING:
    from data_prep.rules.filter import Filter, Outcome

VERSION = 3
COLUMNS = ("id", "url", "text", "source", "time", "file", "position")


@functools.lru_cache(maxsize=16)
def make_filter(rules: str, config: str, languages: tuple[str, ...] | None) -> Filter:
    """A filter, made once in a process; `config` is a FilterConfig as JSON."""
    from data_prep.rules.filter import Filter

    return Filter(rules, FilterConfig.model_validate_json(config),
                  languages=None if languages is None else list(languages))


def filter_of(unit: Unit, config: FilterConfig) -> Filter:
    """The filter of a unit's source; made once in a process."""
    languages = unit["languages"]
    return make_filter(unit["rules"], config.model_dump_json(), None if languages is None else tuple(languages))


def run(unit: Unit, options: dict[str, Any]) -> dict[str, Any]:
    """Filter the part at `unit["location"]` with the rule set `unit["rules"]`."""
    return run_unit(unit, options, _filter_part)


def _filter_part(unit: Unit, options: dict[str, Any], output: Output) -> None:
    config = config_of(options).filter
    part = read_part(unit["location"], COLUMNS)
    chosen = filter_of(unit, config)
    seen = Measured(chosen, samples=config.samples)
    kept: dict[str, list] = {name: [] for name in (*COLUMNS, "digest_high", "digest_low")}
    for record in zip(*(part[name] for name in COLUMNS), strict=True):
        values = dict(zip(COLUMNS, record, strict=True))
        raw = values["text"]
        outcome = chosen.apply(raw, values["url"])
        digest = hashlib.blake2b(outcome.text.encode("utf-8"), digest_size=16).digest()
        seen.add(values, outcome, digest)
        if outcome.failed:
            continue
        values["text"] = outcome.text
        values["digest_high"] = int.from_bytes(digest[:8], "little")
        values["digest_low"] = int.from_bytes(digest[8:], "little")
        for name, value in values.items():
            kept[name].append(value)
    if kept["id"]:
        kept["row"] = list(range(len(kept["id"])))
        write_part(output.file(f"{unit['id']}.parquet"), kept, document_schema())
    output.counters |= seen.counters()


def document_schema():
    """Columns of a filtered part: the record's, `row`, and a 128-bit hash of its text."""
    import pyarrow as pa

    from data_prep.records import schema

    fields = [*schema(), pa.field("digest_high", pa.uint64(), nullable=False),
              pa.field("digest_low", pa.uint64(), nullable=False), pa.field("row", pa.int32(), nullable=False)]
    return pa.schema(fields)


class Measured:
    """Counts of a part: input and kept documents, measured values and dropped documents of each rule, and a few
    samples.

    `removed` counts the parts removed from kept documents.
    """

    def __init__(self, chosen: Filter, *, samples: int):
        self._filter, self._samples = chosen, samples
        self._values: dict[str, list[float]] = defaultdict(list)
        self._failed: Counter[str] = Counter()
        self._only: Counter[str] = Counter()
        self._removed: Counter[str] = Counter()
        self._languages: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self._shown: dict[str, list[dict]] = defaultdict(list)
        self._counts = Counter({"in": 0, "in_bytes": 0, "kept": 0, "kept_bytes": 0, "dropped": 0})

    def add(self, record: dict[str, Any], outcome: Outcome, digest: bytes) -> None:
        """Count one document."""
        size = len(record["text"].encode("utf-8"))
        self._counts["in"] += 1
        self._counts["in_bytes"] += size
        for name, value in outcome.values.items():
            self._values[name].append(value)
        self._failed.update(outcome.failed)
        if len(outcome.failed) == 1:
            self._only[outcome.failed[0]] += 1
        if outcome.language:
            place = self._languages[outcome.language]
            place[0] += 1
            place[1] += size
        if outcome.failed:
            self._counts["dropped"] += 1
            self._show(record, outcome, digest)
        else:
            self._counts["kept"] += 1
            self._counts["kept_bytes"] += len(outcome.text.encode("utf-8"))
            self._removed.update(outcome.removed)

    def _show(self, record: dict[str, Any], outcome: Outcome, digest: bytes) -> None:
        rule = outcome.failed[0]
        shown = self._shown[rule]
        if len(shown) >= 4 * self._samples:
            shown[:] = lowest(shown, self._samples)
        shown.append({"order": digest.hex(), "rule": rule, "id": record["id"], "url": record["url"],
                      "text": record["text"][:SHOWN_CHARACTERS], "value": outcome.values.get(rule)})

    def counters(self) -> dict[str, Any]:
        """The counts as JSON values. `histograms`: counts in the bins of each rule's edges, with open ends."""
        from data_prep.rules.registry import RULES

        histograms = {}
        for name, values in self._values.items():
            edges = np.asarray(RULES[name].edges)
            array = np.nan_to_num(np.asarray(values, np.float64), nan=edges[0])
            histograms[name] = np.histogram(np.clip(array, edges[0], edges[-1]), edges)[0].tolist()
        samples = [sample for rule in sorted(self._shown)
                   for sample in lowest(self._shown[rule], self._samples)]
        return {**self._counts, "failed": dict(self._failed), "only": dict(self._only),
                "removed": dict(self._removed), "languages": dict(self._languages), "histograms": histograms,
                "samples": samples}
