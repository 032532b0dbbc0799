"""The report page of a corpus: input counts, and what each stage and rule removed, with sample documents.

One self-contained HTML file made from the values of report.json alone; any part of them may be missing or null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctllm_jax.report.distributions import Histogram, bar_list, curve, histogram, size_bars
from ctllm_jax.report.page import frame, save
from ctllm_jax.report.readable import compact, duration, finite, percent
from ctllm_jax.report.tables import cards, section, shown, switch, table
from data_prep.report_documents import document, pairs

Report = Mapping[str, Any]

_FILES_SHOWN = 60
_MB = 1e6
_STAGES = {"read": "bad records set aside", "filter": "rules", "exact": "exact duplicates",
           "minhash": "near-duplicates", "lines": "similar lines within documents, evaluation text",
           "tokenize": "into the dataset"}

_TIMED_AS = {"lines": "clean"}
"""Rows of the funnel whose time is listed under another name."""


def write_page(report: Report, path: str | Path) -> Path:
    """Write the page of a report to a file atomically. Raises UserError if it cannot be written."""
    return save(render(report), path)


def render(report: Report) -> str:
    """The page as HTML text."""
    body = [_head(report), _problems(report), _cards(report), _funnel(report), _inputs(report),
            *(_rules(report, source) for source in _sources(report)), _kept(report), _removed(report),
            _copies(report), _decontamination(report), _languages(report), _datasets(report), _time(report),
            _config(report)]
    return frame(f"Corpus · {report.get('output') or ''}", body)


def funnel_problems(report: Report) -> list[str]:
    """Where documents of the funnel are lost or doubled: within a stage, or between one and the next."""
    found = []
    before: dict[str, Mapping] = {}
    for row in _list(report, "funnel"):
        name, source = row.get("stage"), row.get("source")
        came, out = _count(row, "in"), sum(_count(row, key) for key in ("kept", "dropped", "quarantined"))
        if came != out:
            found.append(f"{source}, {name}: {came:,} came in, but kept, dropped and quarantined are {out:,}")
        previous = before.get(source)
        if previous is not None and _count(previous, "kept") != came:
            found.append(f"{source}: {previous.get('stage')} kept {_count(previous, 'kept'):,}, but {came:,} came into "
                         f"{name}")
        before[source] = row
    return found


def _list(report: Report, key: str) -> Sequence[Mapping]:
    return report.get(key) or []


def _map(report: Report, key: str) -> Mapping:
    return report.get(key) or {}


def _count(row: Mapping, key: str) -> int:
    return int(finite(row.get(key)) or 0)


def _sources(report: Report) -> list[str]:
    rows = [*_list(report, "funnel"), *_list(report, "rules"), *_list(report, "samples")]
    return list(dict.fromkeys(row.get("source") for row in rows))


def _share(part: float, whole: float) -> str:
    return percent(part / whole) if whole else "–"


def _size(count: float) -> str:
    return f"{compact(count)}B"


def _number(value: object) -> str:
    number = finite(value)
    return "–" if number is None else f"{number:,.0f}"


def _head(report: Report) -> str:
    statistics = report.get("mode") == "statistics"
    said = [("statistics: every rule was measured on every document" if statistics else
             "production: a document stops at the first rule that it fails", ""),
            ("punctuation is written as ASCII, as in CT-LLM's released corpus" if report.get("writes_punctuation") else
             "punctuation is written unchanged", "note" if report.get("writes_punctuation") else "")]
    if report.get("limit"):
        said.append((f"a trial: the first {report['limit']:,} records of each source", "note"))
    states = "".join(f'<span class="state {kind}">{shown(words)}</span>' for words, kind in said)
    command = f'<p class="command"><code>{shown(report["command"])}</code></p>' if report.get("command") else ""
    title = f"Corpus {shown(report.get('output') or '')}"
    return f'<header><h1>{title}</h1><p class="states">{states}</p>{command}</header>'


def _problems(report: Report) -> str:
    lines = "".join(f"<li>{shown(problem)}</li>" for problem in funnel_problems(report))
    return f'<ul class="problems">{lines}</ul>' if lines else ""


def _first_and_last(report: Report, source: str | None = None) -> tuple[list[Mapping], list[Mapping]]:
    """The first and the last funnel row of each source, or of one."""
    rows: dict[str, list[Mapping]] = {}
    for row in _list(report, "funnel"):
        if source is None or row.get("source") == source:
            rows.setdefault(row.get("source"), []).append(row)
    return [own[0] for own in rows.values()], [own[-1] for own in rows.values()]


def _cards(report: Report) -> str:
    first, last = _first_and_last(report)
    facts = []
    if first:
        came, kept = sum(_count(row, "in") for row in first), sum(_count(row, "kept") for row in last)
        size, left = sum(_count(row, "in_bytes") for row in first), sum(_count(row, "kept_bytes") for row in last)
        facts += [("documents", compact(kept), f"{_share(kept, came)} of {came:,} read"),
                  ("text", _size(left), f"{_share(left, size)} of {_size(size)}")]
        bad = sum(_count(row, "quarantined") for row in _list(report, "funnel"))
        facts.append(("bad records", compact(bad), "put aside" if bad else "none"))
    tokens = sum(_count(row, "tokens") for row in _list(report, "datasets"))
    if tokens:
        text = sum(_count(row, "text_bytes") for row in _list(report, "datasets"))
        facts.append(("tokens", compact(tokens), f"{text / tokens:.2f} bytes each"))
    seconds = sum(finite(value) or 0 for value in _map(report, "seconds").values())
    if seconds:
        read = sum(_count(row, "in_bytes") for row in first) / _MB
        facts.append(("time", duration(seconds), f"{read / seconds:.1f} MB/s of text read" if read else ""))
    if finite(report.get("peak_memory")):
        facts.append(("memory", _size(report["peak_memory"]), "the largest process"))
    return cards(facts)


def _funnel(report: Report) -> str:
    rows = _list(report, "funnel")
    if not rows:
        return ""
    sources = list(dict.fromkeys(row.get("source") for row in rows))
    parts = [_funnel_table(_all_sources(rows), "all sources")] if len(sources) > 1 else []
    parts += [_funnel_table([row for row in rows if row.get("source") == source], source) for source in sources]
    wrong = len(funnel_problems(report))
    note = (f"{wrong} rows do not add up, see above" if wrong else
            f"in = kept + dropped + quarantined, and each stage takes what the one before kept: checked in all "
            f"{len(rows)} rows")
    return section("Funnel", "".join(parts), note)


def _all_sources(rows: Sequence[Mapping]) -> list[dict]:
    stages: dict[str, dict] = {}
    for row in rows:
        total = stages.setdefault(row.get("stage"), {"stage": row.get("stage")})
        for key in ("in", "kept", "dropped", "quarantined", "in_bytes", "kept_bytes", "cpu_seconds"):
            total[key] = total.get(key, 0) + (finite(row.get(key)) or 0)
    return list(stages.values())


def _funnel_table(rows: Sequence[Mapping], title: str) -> str:
    raw = _count(rows[0], "in_bytes")
    cells = []
    for row in rows:
        seconds, kept = finite(row.get("cpu_seconds")), _count(row, "kept_bytes")
        part = kept / raw if raw else 0
        cells.append([
            f"{shown(row.get('stage'))} <small>{_STAGES.get(row.get('stage'), '')}</small>",
            *(f"{_count(row, key):,}" for key in ("in", "kept", "dropped", "quarantined")),
            _share(_count(row, "kept"), _count(row, "in")), _size(kept),
            f"{_count(row, 'in_bytes') / _MB / seconds:.1f}" if seconds else "–",
            f'<b>{_share(kept, raw)}</b><span class="bar model" style="width:{100 * part:.1f}%"></span>'])
    head = ["stage", "in", "kept", "dropped", "quarantined", "kept of in", "text kept", "MB/s a core",
            "of the raw text"]
    return f"<h3>{shown(title)}</h3>{table(head, cells, 'figures funnel')}"


def _inputs(report: Report) -> str:
    files = _list(report, "inputs")
    if not files:
        return ""
    cells = []
    for row in files[:_FILES_SHOWN]:
        kind = " ".join(str(row[key]) for key in ("kind", "compression") if row.get(key))
        found = row.get("sample")
        sample = found.get("text") if isinstance(found, Mapping) else found
        cells.append([shown(row.get("source")), f'<div class="cell">{shown(row.get("file"))}</div>', shown(kind),
                      shown(row.get("encoding") or "–"), shown(row.get("text_field") or "–"),
                      *(_number(row.get(key)) for key in ("records", "quarantined", "kept", "dropped")),
                      _size(_count(row, "bytes")),
                      f'<div class="cell clip">{shown(str(sample or "–")[:120])}</div>'])
    more = f'<p class="none">… and {len(files) - _FILES_SHOWN:,} more files.</p>' if len(files) > _FILES_SHOWN else ""
    encodings = ", ".join(f"{name} {_number(count)}" for name, count in _map(report, "encodings").items())
    head = ["source", "file", "kind", "encoding", "text field", "records", "bad", "kept", "dropped", "size",
            "first record"]
    others = [[shown(reason), _number(count)] for reason, count in _map(report, "left_out").items()]
    if others:
        more += (f"<details><summary>what is no text, and was left out</summary>"
                 f"{table(['records', 'count'], others, 'figures')}</details>")
    return section("Input", table(head, cells) + more, f"documents by encoding: {encodings}" if encodings else "")


def _bounds(row: Mapping) -> str:
    low, high = finite(row.get("low")), finite(row.get("high"))
    signs = (">" if row.get("above") else "≥", low), ("≤", high)
    words = [f"{sign} {value:g}" for sign, value in signs if value is not None]
    return " and ".join(words) or "–"


def _rules(report: Report, source: str) -> str:
    """A source's rules: a table of all, then those that dropped documents, with these documents."""
    rows = sorted((row for row in _list(report, "rules") if row.get("source") == source),
                  key=lambda row: -_count(row, "failed"))
    if not rows:
        return ""
    sets = [row for row in _list(report, "rule_sets") if row.get("source") == source]
    note = f"rule set {' and '.join(str(row.get('name')) for row in sets)}" if sets else ""
    active, quiet = ([row for row in rows if bool(_count(row, "failed")) == failed] for failed in (True, False))
    dropped: dict[str, list[Mapping]] = {row.get("name"): [] for row in active}
    for sample in _list(report, "samples"):
        if sample.get("source") == source and sample.get("rule") and not sample.get("kept"):
            dropped.setdefault(sample["rule"], []).append(sample)
    by_name, already, blocks, figures = {row.get("name"): row for row in active}, set(), [], []
    for name, found in dropped.items():
        row, new = by_name.get(name), [sample for sample in found if sample.get("id") not in already]
        already.update(sample.get("id") for sample in new)
        if new:
            blocks.append(_rule(name, row, new, len(found) - len(new)))
        elif row:
            figures.append(_rule_figure(row))
    parts = [_rule_table(active) if active else "", *blocks, _figures(figures, "No further documents to be shown")]
    if quiet:
        parts.append(f"<details><summary>{len(quiet)} rules that dropped nothing</summary>"
                     f"{_figures([_rule_figure(row) for row in quiet])}</details>")
    left_out = [[f"<code>{shown(rule)}</code>", shown(why)] for row in sets
                for rule, why in (row.get("left_out") or {}).items()]
    if left_out:
        parts.append(f"<details><summary>{len(left_out)} rules that are not in this set, and why</summary>"
                     f"{table(['rule', 'why'], left_out)}</details>")
    buttons = switch("counts", {"linear": "counts", "log": "log counts"})
    return (f'<section><div class="switches"><h2>Rules · {shown(source)} <small>{shown(note)}</small></h2>{buttons}'
            f'</div>{"".join(parts)}</section>')


def _rule_table(rows: Sequence[Mapping]) -> str:
    most = max((_count(row, "failed") / max(1, _count(row, "measured")) for row in rows), default=0)
    cells = []
    for row in rows:
        failed, measured = _count(row, "failed"), _count(row, "measured")
        share = failed / measured if measured else 0
        cells.append([f"<b>{shown(row.get('name'))}</b> <small>{shown(row.get('code') or '')}</small>", _bounds(row),
                      f"{measured:,}", f"{failed:,}", _number(row.get("only")),
                      f'{_share(failed, measured)}<span class="bar model" '
                      f'style="width:{100 * share / most if most else 0:.1f}%"></span>'])
    return table(["rule", "kept", "measured", "failed", "by this alone", "share failed"], cells, "figures funnel")


def _rule_figure(row: Mapping) -> str:
    edges, counts = row.get("edges") or [], row.get("counts") or []
    doc = str(row.get("doc") or "").split("\n\n")[0]
    caption = (f"<figcaption><b>{shown(row.get('name'))}</b> <small>{shown(row.get('code') or '')} · kept: "
               f"{_bounds(row)}</small></figcaption>")
    if len(edges) == len(counts) + 1 and any(counts):
        drawn = histogram(Histogram(str(row.get("name")), edges, counts, finite(row.get("low")),
                                    finite(row.get("high")), bool(row.get("above")), _count(row, "failed")))
    else:
        drawn = '<p class="none">Nothing was measured.</p>' if edges else ""
    return f'<figure class="chart">{caption}{drawn}<small>{shown(doc)}</small></figure>'


def _rule(name: str, row: Mapping | None, dropped: Sequence[Mapping], above: int) -> str:
    """A rule with documents that it dropped; `above`: number of further ones that are shown with earlier rules."""
    figure = _rule_figure(row) if row else f"<div><b>{shown(name)}</b></div>"
    head = f"dropped: {_count(row, 'failed'):,} of {_count(row, 'measured'):,}" if row else "dropped"
    head += f"; {above} of those chosen are shown above" if above else ""
    texts = "".join(map(document, dropped))
    return f'<div class="rule">{figure}<div><h4>{head}</h4><div class="docs">{texts}</div></div></div>'


def _figures(figures: Sequence[str], title: str = "") -> str:
    head = f"<h3>{title}</h3>" if title else ""
    return f'{head}<div class="grid figures">{"".join(figures)}</div>' if figures else ""


def _kept(report: Report) -> str:
    parts = []
    for source in _sources(report):
        found = [sample for sample in _list(report, "samples") if sample.get("kept") and sample.get("source") == source]
        if found:
            parts.append(f'<h3>{shown(source)}</h3><div class="docs">{"".join(map(document, found))}</div>')
    note = "the beginnings of some, as they are written"
    return section("Documents that stay", "".join(parts), note) if parts else ""


def _removed(report: Report) -> str:
    cells = [[shown(source), shown(str(name).replace("_", " ")), f"{_count(counts, name):,}"]
             for source, counts in _map(report, "removed").items() for name in counts or {} if _count(counts, name)]
    lines = _map(report, "lines")
    if lines:
        cells.append(["all", f"similar lines, in {_number(lines.get('documents'))} documents with "
                             f"{_number(lines.get('characters'))} characters", _number(lines.get("lines"))])
    title = "Taken out of documents that the rules keep"
    shown_pairs = pairs(_list(report, "samples"), "lines")
    return section(title, table(["source", "what", "count"], cells) + shown_pairs) if cells else ""


def _copies(report: Report) -> str:
    exact, found, parts = _map(report, "exact"), _map(report, "minhash"), []
    samples = _list(report, "samples")
    if exact:
        parts.append(f"<h3>Exact</h3><p>{_number(exact.get('groups'))} texts occur more than once; the most frequent "
                     f"one {_number(exact.get('largest'))} times.</p>{pairs(samples, 'exact')}")
    if found:
        verified = finite(found.get("verified"))
        facts = [f"{_number(found.get('candidates'))} candidate pairs",
                 "taken as they are" if verified is None else f"{verified:,.0f} of them verified with Jaccard ≥ "
                                                              f"{found.get('verify')}",
                 f"{_number(found.get('too_short'))} documents too short to be compared"]
        parts.append(f"<h3>Near</h3><p>{shown('; '.join(facts))}.</p>"
                     f'<div class="grid large">{_curve(found)}{_clusters(found)}</div>{pairs(samples, "minhash")}')
    return section("Copies", "".join(parts), "of each group, one stays") if parts else ""


def _curve(found: Mapping) -> str:
    points = [(left, up) for left, up in found.get("curve") or [] if finite(left) is not None is not finite(up)]
    half = next((left for left, up in points if up >= 0.5), None)
    bands = f"{found.get('bands')} bands × {found.get('rows')} rows of {found.get('permutations')} permutations"
    drawn = curve("probability of being found", points, [] if half is None else [(half, f"half are found at {half:g}")]
                  ) if points else '<p class="none">No curve.</p>'
    return (f'<figure class="chart"><figcaption><b>Pairs found</b> <small>by their Jaccard similarity</small>'
            f"</figcaption>{drawn}<small>{shown(bands)}, {shown(found.get('shingle'))} characters a shingle</small>"
            f"</figure>")


def _clusters(found: Mapping) -> str:
    bars = size_bars(found.get("cluster_sizes") or [])
    drawn = bar_list(bars) or '<p class="none">No clusters.</p>'
    return (f'<figure class="chart"><figcaption><b>Clusters</b> <small>documents in a cluster, and how many there are'
            f"</small></figcaption>{drawn}</figure>")


def _decontamination(report: Report) -> str:
    found = _map(report, "decontamination")
    if not found:
        return ""
    dropped = [sample for sample in _list(report, "samples") if sample.get("stage") == "decontamination"]
    texts = "".join(f"<p>Evaluation text, as it is compared: <mark>{shown(sample.get('other') or '')}</mark></p>"
                    f'<div class="docs">{document(sample)}</div>' for sample in dropped)
    return section("Evaluation text", f"<p>{_number(found.get('documents'))} documents hold passages of the evaluation "
                   f"sets ({_number(found.get('ngrams'))} n-grams), and are left out.</p>{texts}")


def _languages(report: Report) -> str:
    parts = []
    for source in dict.fromkeys(row.get("source") for row in _list(report, "languages")):
        rows = [row for row in _list(report, "languages") if row.get("source") == source][:12]
        bars = bar_list([(str(row.get("language") or "?"), _count(row, "documents")) for row in rows],
                        note=[_size(_count(row, "bytes")) for row in rows])
        parts.append(f'<figure class="chart"><figcaption><b>{shown(source)}</b></figcaption>{bars}</figure>')
    note = "documents whose language was looked at, kept or dropped, and their text"
    return section("Languages", f'<div class="grid large">{"".join(parts)}</div>', note) if parts else ""


def _datasets(report: Report) -> str:
    cells = [[shown(row.get("source")), shown(row.get("split")), _number(row.get("documents")),
              _number(row.get("tokens")), _size(_count(row, "text_bytes")),
              f"{_count(row, 'text_bytes') / _count(row, 'tokens'):.2f}" if _count(row, "tokens") else "–",
              _number(row.get("shards"))] for row in _list(report, "datasets")]
    head = ["source", "split", "documents", "tokens", "text", "bytes a token", "shards"]
    return section("Datasets", table(head, cells, "figures")) if cells else ""


def _time(report: Report) -> str:
    wall, cores = _map(report, "seconds"), _map(report, "cpu_seconds")
    sizes: dict[str, int] = {}
    for row in _list(report, "funnel"):
        stage = _TIMED_AS.get(row.get("stage"), row.get("stage"))
        sizes[stage] = sizes.get(stage, 0) + _count(row, "in_bytes")
    cells = []
    for stage in dict.fromkeys([*wall, *cores]):
        seconds, used = finite(wall.get(stage)), finite(cores.get(stage))
        cells.append([shown(stage), *("–" if value is None else duration(value) for value in (seconds, used)),
                      *(f"{sizes[stage] / _MB / value:.1f}" if value and stage in sizes else "–"
                        for value in (seconds, used))])
    head = ["stage", "time", "CPU time", "MB/s", "MB/s a core"]
    return section("Time", table(head, cells, "figures"), "MB of text that came into the stage") if cells else ""


def _config(report: Report) -> str:
    if not report.get("config"):
        return ""
    text = json.dumps(report["config"], ensure_ascii=False, indent=2)
    return section("Config", f"<details><summary>config</summary><pre>{shown(text)}</pre></details>")
