"""The results of a pipeline run as one JSON value: the numbers of report.json and of its page."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctllm_jax.config.prepare import PrepareConfig
from data_prep.commits import fingerprint, write_atomically
from data_prep.readers import describe
from data_prep.rules import EMPTY, RULES, SETS, with_thresholds
from data_prep.stages.common import SHOWN_CHARACTERS, lowest

if TYPE_CHECKING:
    from data_prep.pipeline import Done, Ran

VERSION = 1
_CURVE_STEPS = 50
_STAGE_OF = {"lines": "clean"}


def make_report(config: PrepareConfig, ran: Ran, *, command: str) -> dict[str, Any]:
    """The report of a run; JSON values. Every funnel row has in = kept + dropped + quarantined."""
    funnel = _funnel(ran)
    for row in funnel:
        if row["in"] != row["kept"] + row["dropped"] + row["quarantined"]:
            raise AssertionError(f"documents were lost or doubled: {row}")
    return {
        "version": VERSION, "state": state(config, ran), "output": config.output, "command": command,
        "mode": config.filter.mode,
        "writes_punctuation": config.filter.write_punctuation, "limit": config.limit,
        "config": config.model_dump(mode="json"), "seconds": ran.seconds, "cpu_seconds": ran.cpu_seconds,
        "peak_memory": ran.peak_memory or None, "inputs": _inputs(ran), "encodings": _encodings(ran),
        "funnel": funnel, "rule_sets": _rule_sets(config, ran), "rules": _rules(config, ran),
        "left_out": _sums(ran.stages["read"], "left_out"),
        "removed": {source: _sums(done, "removed") for source, done in _by_source(ran.stages["filter"]).items()},
        "samples": _samples(config, ran), "languages": _languages(ran),
        "exact": _only(ran, "exact", ("groups", "largest")), "minhash": _minhash(config, ran),
        "lines": _lines(config, ran), "decontamination": _decontamination(config, ran), "datasets": _datasets(ran)}


def state(config: PrepareConfig, ran: Ran) -> str:
    """Hash of a report's subject; it is equal for an unchanged output and an equivalent config.

    A run that had nothing to do may still need a new report: a source is gone, or the run before was killed before it
    wrote one.
    """
    free = {name for name, one in type(config).model_fields.items() if (one.json_schema_extra or {}).get("changeable")}
    return fingerprint(config.model_dump(mode="json", exclude={*free, "output"}),
                       {name: [[unit["id"], commit.key] for unit, commit in done] for name, done in ran.stages.items()},
                       {source: manifest.config_sha256 for source, manifest in ran.manifests.items()})


def write_report(config: PrepareConfig, ran: Ran, *, command: str) -> dict[str, Any]:
    """Write report.json and report.html into the output directory."""
    from data_prep.report_page import write_page

    report = make_report(config, ran, command=command)
    output = Path(config.output)
    write_atomically(output / "report.json", json.dumps(report, ensure_ascii=False, indent=1))
    write_page(report, output / "report.html")
    return report


def _by_source(done: Done) -> dict[str, Done]:
    sources: dict[str, Done] = defaultdict(list)
    for unit, commit in done:
        sources[unit["source"]].append((unit, commit))
    return dict(sources)


def _total(done: Done, name: str) -> int:
    return sum(commit.counters[name] for _, commit in done)


def _sums(done: Done, name: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for _, commit in done:
        total.update(commit.counters[name])
    return dict(total)


def _inputs(ran: Ran) -> list[dict[str, Any]]:
    """Every file of a source: its number of records, and how many of them were set aside, kept and dropped."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    # By unit, because parts hold the path that a file had when it was read. The id of a part ends in its number.
    files = {unit["id"]: (unit["source"], unit["location"]["file"]) for unit, _ in ran.stages["read"]}
    for unit, commit in ran.stages["read"]:
        counts[files[unit["id"]]].update(
            {"records": commit.counters["records"], "quarantined": commit.counters["quarantined"]})
    for unit, commit in ran.stages["clean"]:
        counts[files[unit["id"].rpartition("-")[0]]]["kept"] += commit.counters["kept"]
    rows = []
    for row in describe(ran.inputs):
        found = counts[row["source"], row["file"]]
        rows.append({**row, **{name: found[name] for name in ("records", "quarantined", "kept")},
                     "dropped": found["records"] - found["kept"]})
    return rows


def _encodings(ran: Ran) -> dict[str, int]:
    return _sums(ran.stages["read"], "encodings")


def _funnel(ran: Ran) -> list[dict[str, Any]]:
    """Input and output counts of each stage. `in`, `kept` and `dropped` are counted independently:
    what a stage gave is what the next one counts as coming in."""
    rows = []
    stages = {name: _by_source(ran.stages[name]) for name in ("read", "filter", "minhash", "clean")
              if name in ran.stages}
    for source, read in stages["read"].items():
        def total(stage: str, name: str, source: str = source) -> int:
            return _total(stages[stage].get(source, []), name)

        def gone(stage: str, source: str = source) -> int:
            return sum(len(unit["dropped"]) for unit, _ in stages[stage].get(source, []))

        records, bad, size = (_total(read, name) for name in ("records", "quarantined", "bytes"))
        rows.append(_row("read", source, records + bad, records, 0, bad, size, size))
        rows.append(_row("filter", source, records, total("filter", "kept"), total("filter", "dropped"), 0, size,
                         total("filter", "kept_bytes")))
        after = ("clean", "in", "in_bytes")
        then = ("minhash", "documents", "bytes") if "minhash" in stages else after
        if "exact" in ran.stages:
            rows.append(_row("exact", source, total("filter", "kept"), total(*then[:2]), gone(then[0]), 0,
                             total("filter", "kept_bytes"), total(then[0], then[2])))
        if "minhash" in stages:
            rows.append(_row("minhash", source, total(*then[:2]), total(*after[:2]), gone("clean") - gone("minhash"),
                             0, total(then[0], then[2]), total("clean", "in_bytes")))
        rows.append(_row("lines", source, total("clean", "in"), total("clean", "kept"), total("clean", "contaminated"),
                         0, total("clean", "in_bytes"), total("clean", "kept_bytes")))
        if source in ran.manifests:
            splits = ran.manifests[source].splits.values()
            kept, text = (sum(split.total(name) for split in splits) for name in ("documents", "text_bytes"))
            rows.append(_row("tokenize", source, total("clean", "kept"), kept, 0, 0, total("clean", "kept_bytes"),
                             text))
    for row in rows:
        seconds = sum(commit.counters.get("cpu_seconds", 0) for _, commit in
                      stages.get(_STAGE_OF.get(row["stage"], row["stage"]), {}).get(row["source"], []))
        row["cpu_seconds"] = round(seconds, 3)
    return rows


def _row(stage: str, source: str, came: int, kept: int, dropped: int, quarantined: int, in_bytes: int, kept_bytes: int
         ) -> dict[str, Any]:
    return {"stage": stage, "source": source, "in": came, "kept": kept, "dropped": dropped,
            "quarantined": quarantined, "in_bytes": in_bytes, "kept_bytes": kept_bytes}


def _sets_of(ran: Ran) -> dict[str, list[str]]:
    """The rule sets that a source's files have; `auto` may give several."""
    return {source: sorted({unit["rules"] for unit, _ in done})
            for source, done in _by_source(ran.stages["filter"]).items()}


def _rule_sets(config: PrepareConfig, ran: Ran) -> list[dict[str, Any]]:
    sets = with_thresholds(SETS, config.filter.thresholds)
    return [{"source": source, "name": name, "left_out": dict(sets[name].left_out)}
            for source, names in _sets_of(ran).items() for name in names]


def _rules(config: PrepareConfig, ran: Ran) -> list[dict[str, Any]]:
    sets = with_thresholds(SETS, config.filter.thresholds)
    rows = []
    for source, done in _by_source(ran.stages["filter"]).items():
        for name in _sets_of(ran)[source]:
            own = [(unit, commit) for unit, commit in done if unit["rules"] == name]
            failed, only = _sums(own, "failed"), _sums(own, "only")
            for rule, bounds in sets[name].bounds.items():
                counts = [commit.counters["histograms"][rule] for _, commit in own
                          if rule in commit.counters["histograms"]]
                merged = [sum(column) for column in zip(*counts, strict=True)]
                known = RULES[rule]
                rows.append({"source": source, "name": rule, "code": known.code, "version": known.version,
                             "doc": known.doc, "above": bounds.above, "low": _finite(bounds.low),
                             "high": _finite(bounds.high),
                             "measured": sum(merged), "failed": failed.get(rule, 0),
                             "only": only.get(rule, 0) if config.filter.mode == "statistics" else None,
                             "edges": list(known.edges), "counts": merged or [0] * (len(known.edges) - 1)})
            statistics, empty = config.filter.mode == "statistics", failed.get(EMPTY, 0)
            rows.append({"source": source, "name": EMPTY, "code": "", "version": 1, "above": False, "high": None,
                         "low": 1.0, "doc": "Characters that are left after the removal of links and lines; at least "
                                            "as many as the set's shortest length where lines were taken out.",
                         "measured": _total(own, "in") if statistics else _total(own, "kept") + empty,
                         "failed": empty, "only": only.get(EMPTY, 0) if statistics else None, "edges": [],
                         "counts": []})
    return rows


def _finite(bound: float) -> float | None:
    return bound if abs(bound) != float("inf") else None


def _samples(config: PrepareConfig, ran: Ran) -> list[dict[str, Any]]:
    count, shown = config.filter.samples, []
    for source, done in _by_source(ran.stages["filter"]).items():
        by_rule: dict[str, list[dict]] = defaultdict(list)
        for _, commit in done:
            for sample in commit.counters["samples"]:
                by_rule[sample["rule"]].append(sample)
        for rule in sorted(by_rule):
            shown += [_sample(sample, source, "filter", rule=rule, kept=False, value=sample["value"])
                      for sample in lowest(by_rule[rule], count)]
    for stage, pairs in ran.copies.items():
        shown += [_sample(pair["dropped"], pair["dropped"]["source"], stage, kept=False,
                          other=pair["kept"]["text"][:SHOWN_CHARACTERS]) for pair in pairs]
    for source, done in _by_source(ran.stages["clean"]).items():
        found = [sample for _, commit in done for sample in commit.counters["samples"]]
        shown += [_sample(sample, source, "decontamination", kept=False, value=sample["value"],
                          other=sample["passage"])
                  for sample in lowest(found, count)]
        found = [sample for _, commit in done for sample in commit.counters["line_pairs"]]
        shown += [_sample(sample, source, "lines", kept=False, other=sample["other"][:SHOWN_CHARACTERS])
                  for sample in lowest(found, count)]
        stay = [sample for _, commit in done for sample in commit.counters["stay"]]
        shown += [_sample(sample, source, "clean", kept=True) for sample in lowest(stay, count)]
    return shown


def _sample(sample: dict[str, Any], source: str, stage: str, *, kept: bool, rule: str | None = None,
            value: float | None = None, other: str | None = None) -> dict[str, Any]:
    return {"source": source, "stage": stage, "rule": rule, "kept": kept, "id": sample["id"], "url": sample["url"],
            "text": sample["text"][:SHOWN_CHARACTERS], "value": value, "other": other}


def _languages(ran: Ran) -> list[dict[str, Any]]:
    rows = []
    for source, done in _by_source(ran.stages["filter"]).items():
        total: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for _, commit in done:
            for language, (documents, size) in commit.counters["languages"].items():
                total[language][0] += documents
                total[language][1] += size
        rows += [{"source": source, "language": language, "documents": documents, "bytes": size}
                 for language, (documents, size) in sorted(total.items(), key=lambda one: -one[1][0])]
    return rows


def _only(ran: Ran, stage: str, names: Sequence[str]) -> dict[str, Any] | None:
    if stage not in ran.stages:
        return None
    (_, commit), = ran.stages[stage]
    return {name: commit.counters[name] for name in names}


def _minhash(config: PrepareConfig, ran: Ran) -> dict[str, Any] | None:
    from data_prep.dedup.minhash import match_probability

    found = _only(ran, "clusters", ("candidates", "verified", "cluster_sizes"))
    if found is None:
        return None
    options = config.minhash
    curve = [[step / _CURVE_STEPS, match_probability(step / _CURVE_STEPS, options.bands, options.rows)]
             for step in range(_CURVE_STEPS + 1)]
    return {"permutations": options.permutations, "bands": options.bands, "rows": options.rows,
            "shingle": options.shingle, "verify": options.verify, **found, "curve": curve,
            "too_short": _total(ran.stages["minhash"], "too_short")}


def _lines(config: PrepareConfig, ran: Ran) -> dict[str, int] | None:
    done = [(unit, commit) for unit, commit in ran.stages["clean"] if unit["similar_lines"]]
    if not done:
        return None
    return {"documents": _total(done, "documents_with_lines"), "lines": _total(done, "lines"),
            "characters": _total(done, "characters")}


def _decontamination(config: PrepareConfig, ran: Ran) -> dict[str, int] | None:
    if not config.decontaminate.files:
        return None
    return {"ngrams": max((commit.counters["ngrams"] for _, commit in ran.stages["clean"]), default=0),
            "documents": _total(ran.stages["clean"], "contaminated")}


def _datasets(ran: Ran) -> list[dict[str, Any]]:
    return [{"source": source, "split": name, "documents": split.total("documents"), "tokens": split.total("tokens"),
             "text_bytes": split.total("text_bytes"), "shards": len(split.shards)}
            for source, manifest in ran.manifests.items() for name, split in manifest.splits.items()]
