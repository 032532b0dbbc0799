"""The page's tables: headline figures of several runs, held-out bits per byte, samples, stages, events, config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape

from ctllm_jax.report.comparison import (
    best_value,
    compares_answers,
    figures_of,
    groups_of_sources,
    held_out,
    trained_on,
    unequal_held_out,
    unit,
)
from ctllm_jax.report.readable import clock, compact, duration, finite, visible
from ctllm_jax.report.run import Run, differences, final_loss, flatten

_SAMPLES_SHOWN = 6
_EVENTS_SHOWN = 200


def shown(value: object) -> str:
    """Any text as HTML that shows it and does nothing else."""
    return escape(visible(str(value)))


def cards(facts: Sequence[tuple[str, str, str]]) -> str:
    """Headline figures: (label, figure, note) each; nothing if there are none."""
    items = "".join(f"<li><span>{shown(label)}</span><b>{shown(figure)}</b><small>{shown(note)}</small></li>"
                    for label, figure, note in facts)
    return f'<ul class="cards">{items}</ul>' if items else ""


def switch(name: str, choices: Mapping[str, str]) -> str:
    """Buttons that set an attribute of the page, `data-NAME`, to one of the choices: value -> words on the button."""
    buttons = "".join(f'<button type="button" data-set="{name}" data-to="{value}">{words}</button>'
                      for value, words in choices.items())
    return f'<span class="switch">{buttons}</span>'


def section(title: str, content: str, note: str = "") -> str:
    """A section of the page, of content that is HTML already."""
    small = f" <small>{shown(note)}</small>" if note else ""
    return f"<section><h2>{shown(title)}{small}</h2>{content}</section>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _name(names: Sequence[str], index: int) -> str:
    return f'<i class="swatch c{index % 8}"></i>{shown(names[index])}' if len(names) > 1 else shown(names[index])


def problems(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Notes about unreadable parts, shown before any number."""
    said = [f"{_name(names, index) + ': ' if len(runs) > 1 else ''}{shown(problem)}"
            for index, run in enumerate(runs) for problem in run.problems]
    return f'<ul class="problems">{"".join(f"<li>{line}</li>" for line in said)}</ul>' if said else ""


def baselines_of(run: Run, source: str) -> list[tuple[str, float]]:
    """Name and bits per byte of every baseline measured on a source."""
    found = []
    for name, record in run.baselines.items():
        bits = finite(record["sources"].get(source, {}).get("bits_per_byte"))
        if bits is not None:
            found.append((name, bits))
    return found


def against_baselines(run: Run, source: str) -> str:
    """One line: the baselines of a source."""
    known = baselines_of(run, source)
    return " · ".join(f"{name} {bits:.3f}" for name, bits in known) if known else "held out"


def overview(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Headline figures of several runs, a row each, with the counts of each group of dialogues or pairs."""
    rows = []
    groups = list(dict.fromkeys(group for run in runs for group, counts in trained_on(run).items() if "rows" in counts))
    for index, run in enumerate(runs):
        last = run.train[-1] if run.train else {}
        final = final_loss(run)
        speeds = sorted(value for record in run.train if (value := finite(record.get("tokens_per_second"))) is not None)
        tokens = run.tokens_at(last) if last else None
        parameters = finite(run.start.get("parameters"))
        rows.append([
            _name(names, index),
            "–" if final is None else "not finite" if final.value is None else f"{final.value:.3f}",
            f"{run.step:,}",
            "–" if tokens is None else compact(tokens),
            *(_amount(trained_on(run).get(group, {})) for group in groups),
            duration(run.seconds) if run.seconds else "–",
            compact(speeds[len(speeds) // 2]) if speeds else "–",
            "–" if parameters is None else compact(parameters),
        ])
    head = ["run", "final loss", "step", "tokens", *map(shown, groups), "time", "tokens/s", "parameters"]
    note = "final loss: the mean of the last tenth of a run's records, at most 50"
    note += f"; of {', '.join(groups)}: {unit(runs)} and tokens of one epoch" if groups else ""
    return section("Runs", table(head, rows, "figures"), note)


def _amount(counts: dict[str, float]) -> str:
    """Rows of a group, and below them their tokens."""
    if "rows" not in counts:
        return "–"
    tokens = f"<small>{compact(counts['tokens'])} tokens</small>" if "tokens" in counts else ""
    return f"{counts['rows']:,.0f} {tokens}"


def evaluation(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Held-out figures at each run's last evaluation: of pairs, or of text in bits per byte with the baselines below.

    Of several runs, sources of one group are one column.
    """
    unequal = unequal_held_out(runs) if len(runs) > 1 else []
    warning = (f'<ul class="problems"><li>Not all runs were evaluated on the same held-out data of '
               f'{shown(", ".join(unequal))}: these figures are not comparable.</li></ul>' if unequal else "")
    if any(compares_answers(run) for run in runs):
        return _held_out_pairs(runs, names, warning)
    several = len(runs) > 1
    sources = list(dict.fromkeys(source for run in runs for source in (
        [*held_out(run), *run.sources] if several else run.sources)))
    if several:
        grouped = {source: group for run in runs for source, group in groups_of_sources(run).items()}
        sources = [source for source in sources if grouped.get(source, source) == source]
    if not sources:
        return ""
    rows: list[tuple[str, dict[str, dict], str]] = []
    for index, run in enumerate(runs):
        if run.evaluation:
            last = run.evaluation[-1]
            label = _name(names, index) if len(runs) > 1 else "this run"
            found = held_out(run) if several else last["sources"]
            rows.append((f"{label} <small>step {last['step']:,}</small>", found, "model"))
    rows += [(shown(name), found, "baseline") for name, found in _merged_baselines(runs)]
    best, worst = {}, {}
    for source in sources:
        values = [bits for _, found, _ in rows if (bits := _bits(found, source)) is not None]
        best[source], worst[source] = min(values, default=None), max(values, default=None)
    cells = [[label, *(_measure(found, source, best[source], worst[source], kind) for source in sources)]
             for label, found, kind in rows]
    bits = table(["", *(shown(source) for source in sources)], cells, "bits")
    title = "Held-out dialogues" if any(groups_of_sources(run) for run in runs) else "Held-out text"
    return section(title, warning + bits, "bits per byte, lower is better")


def _held_out_pairs(runs: Sequence[Run], names: Sequence[str], warning: str) -> str:
    """Loss, accuracies and margins of the last evaluation, of all pairs and by group: a row a run, the best bold."""
    figures, reached = figures_of(runs), [held_out(run) for run in runs]
    if not figures:
        return ""
    best = [best_value(figure, reached) for figure in figures]
    rows = []
    for index, (run, found) in enumerate(zip(runs, reached, strict=True)):
        if not run.evaluation:
            continue
        cells = []
        for figure, top in zip(figures, best, strict=True):
            value = found.get(figure.group, {}).get(figure.key)
            text = "–" if value is None else shown(figure.spell(value))
            cells.append(f"<b>{text}</b>" if value is not None and value == top else text)
        label = _name(names, index) if len(runs) > 1 else "this run"
        rows.append([f"{label} <small>step {run.evaluation[-1]['step']:,}</small>",
                     f"{found[''].get('pairs', 0):,.0f}" if "" in found else "–", *cells])
    head = ["", "pairs", *(shown(f"{figure.name} {figure.group}".strip()) for figure in figures)]
    return section("Held-out pairs", warning + table(head, rows, "figures"),
                   "accuracy: pairs whose better answer is ahead; margin: by how much")


def _merged_baselines(runs: Sequence[Run]) -> list[tuple[str, dict[str, dict]]]:
    """Baselines of all runs; equal baselines of one name share a row."""
    merged: list[tuple[str, dict[str, dict]]] = []
    for run in runs:
        for name, record in run.baselines.items():
            sources = record["sources"]
            for other, found in merged:
                if other == name and all(found.get(source, values) == values for source, values in sources.items()):
                    found.update(sources)
                    break
            else:
                merged.append((name, dict(sources)))
    return merged


def _bits(found: dict, source: str) -> float | None:
    return finite(found.get(source, {}).get("bits_per_byte"))


def _measure(found: dict, source: str, best: float | None, worst: float | None, kind: str) -> str:
    values = found.get(source, {})
    bits = _bits(found, source)
    notes = []
    loss, count, size = (finite(values.get(key)) for key in ("loss", "tokens", "bytes"))
    if loss is not None:
        notes.append(f"loss {loss:.3f}")
    if count is not None:
        notes.append(f"{compact(count)} tokens")
    if size is not None:
        notes.append(f"{compact(size)}B")
    small = f"<small>{' · '.join(notes)}</small>" if notes else ""
    if bits is None:
        return f"–{small}"
    width = 100 * bits / worst if worst and bits > 0 else 0
    number = f"<b>{bits:.3f}</b>" if bits == best else f"{bits:.3f}"
    return f'{number}<span class="bar {kind}" style="width:{width:.1f}%"></span>{small}'


def config_differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Config keys in which several runs differ."""
    if len(runs) < 2:
        return ""
    rows = differences(list(runs))
    if not rows:
        return section("Config", '<p class="none">The runs do not differ in any key.</p>')
    cells = [[f"<code>{shown(key)}</code>", *("–" if value is None else f"<code>{shown(value)}</code>"
                                              for value in values)] for key, values in rows]
    head = ["key", *(_name(names, index) for index in range(len(runs)))]
    return section("Config", table(head, cells, "config"), "keys that differ")


def samples(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Samples by step: one row per step, one column per prompt, the latest first."""
    parts = []
    for index, run in enumerate(runs):
        if not run.sample:
            continue
        prompts = list(dict.fromkeys(str(record.get("prompt", "")) for record in run.sample))
        steps: dict[int, list[dict]] = {}
        for record in run.sample:
            steps.setdefault(record["step"], []).append(record)
        order = sorted(steps, reverse=True)
        pick = {order[round(place * (len(order) - 1) / max(1, _SAMPLES_SHOWN - 1))] for place in range(_SAMPLES_SHOWN)}
        rows = "".join(_sample_row(run, step, steps[step], prompts, "" if step in pick else ' class="extra"')
                       for step in order)
        rest = len(order) - len(pick)
        more = (f'<button type="button" class="more" data-set="samples" data-to="all">show {rest} more steps</button>'
                if rest > 0 else "")
        title = f"<h3>{_name(names, index)}</h3>" if len(runs) > 1 else ""
        parts.append(f'{title}<div class="samples">{rows}</div>{more}')
    return section("What it wrote", "".join(parts), "newest first; the prompt is highlighted") if parts else ""


def _sample_row(run: Run, step: int, records: list[dict], prompts: list[str], extra: str) -> str:
    tokens = run.tokens_at(records[0])
    seen = f"<small>{compact(tokens)} tokens</small>" if tokens is not None else ""
    texts = "".join(_sample(record) for record in
                    sorted(records, key=lambda record: prompts.index(str(record.get("prompt", "")))))
    return f'<div{extra}><p class="at-step"><b>step {step:,}</b>{seen}</p><div class="texts">{texts}</div></div>'


def _sample(record: dict) -> str:
    prompt, text = str(record.get("prompt", "")), str(record.get("text", ""))
    return f'<p dir="auto"><mark>{shown(prompt)}</mark>{shown(text.removeprefix(prompt))}</p>'


def data(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The use of each source by a whole run, from its start record; and its number of dialogues or pairs."""
    rows, counted = [], any(isinstance(run.start.get("data"), dict) for run in runs)
    for index, run in enumerate(runs):
        epochs = run.start.get("epochs")
        told = _mapping(_mapping(run.start.get("data")).get("sources"))
        for source, tokens in _mapping(run.start.get("tokens_per_source")).items():
            count, times = finite(tokens), finite(_mapping(epochs).get(source))
            own = _mapping(told.get(source))
            facts = [own.get("group"), own.get("rows", own.get("pairs")), own.get("held_out"), own.get("tokens"),
                     own.get("learned_tokens")] if counted else []
            rows.append([*([_name(names, index)] if len(runs) > 1 else []), shown(source), *map(_fact, facts),
                         "–" if count is None else compact(count), "–" if times is None else f"{times:.2f}"])
    head = [*(["run"] if len(runs) > 1 else []), "source",
            *(["group", unit(runs), "held out", "tokens an epoch", "learned"] if counted else []), "tokens", "epochs"]
    return section("Data", table(head, rows, "figures"), "what all steps take of each source") if rows else ""


def _fact(value: object) -> str:
    number = finite(value)
    return "–" if value is None else shown(value) if number is None else f"{number:,.0f}"


def _mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def stages(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The time before and between steps: one row per stage, summed over attempts."""
    totals: dict[str, dict[int, list[float]]] = {}
    for index, run in enumerate(runs):
        told = {record.get("name") for record in run.stages}
        compiled = [{"name": "compile", "seconds": start.get("compile_seconds")} for start in run.starts]
        for record in [*run.stages, *(compiled if "compile" not in told else [])]:
            seconds = finite(record.get("seconds"))
            if seconds is not None:
                totals.setdefault(str(record.get("name", "")), {}).setdefault(index, []).append(seconds)
    if not totals:
        return ""
    rows = [[shown(stage), *(_seconds(by_run.get(index, [])) for index in range(len(runs)))]
            for stage, by_run in totals.items()]
    head = ["stage", *(_name(names, index) if len(runs) > 1 else "time" for index in range(len(runs)))]
    return section("Stages", table(head, rows, "figures"), "seconds that were not steps")


def _seconds(values: list[float]) -> str:
    if not values:
        return "–"
    times = f" <small>{len(values)} times</small>" if len(values) > 1 else ""
    return f"{duration(sum(values))}{times}"


def events(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Starts, warnings and ends in order; checkpoints between two of them are one line."""
    parts = []
    for index, run in enumerate(runs):
        rows = _event_rows(run)
        if not rows:
            continue
        title = f"<h3>{_name(names, index)}</h3>" if len(runs) > 1 else ""
        more = len(rows) - _EVENTS_SHOWN
        left_out = f'<p class="none">… and {more:,} more in metrics.jsonl.</p>' if more > 0 else ""
        parts.append(title + table(["time (UTC)", "step", "event", ""], rows[:_EVENTS_SHOWN], "events") + left_out)
    return section("Events", "".join(parts)) if parts else ""


def _event_rows(run: Run) -> list[list[str]]:
    rows, saved = [], []

    def close() -> None:
        if not saved:
            return
        seconds = [value for record in saved if (value := finite(record.get("seconds"))) is not None]
        first, last = (shown(saved[place].get("step", "–")) for place in (0, -1))
        told = (f"{len(saved)} saved" if len(saved) > 1 else "saved")
        if seconds:
            told += f", {duration(sum(seconds) / len(seconds))}" + (" on average" if len(seconds) > 1 else "")
            told += f", {duration(max(seconds))} at most" if len(seconds) > 1 else ""
        rows.append([clock(saved[-1]["time"]), first if first == last else f"{first} … {last}",
                     '<span class="tag">checkpoint</span>', told])
        saved.clear()

    for record in run.events:
        kind = record["event"]
        if kind == "checkpoint":
            saved.append(record)
            continue
        close()
        words = {"start": _start_words, "warning": lambda it: shown(it.get("message", "")),
                 "request": lambda it: shown(it.get("what", "")),
                 "rollback": lambda it: shown(f"back to step {it['to']:,}, and on at data step {it.get('data_step')}"),
                 "damaged": lambda it: shown(f"record {it.get('record')} of {it.get('shard')}: {it.get('why')};"
                                             f" replaced by record {it.get('replaced_by')}"),
                 "end": lambda it: shown(": ".join(filter(None, (it.get("reason", ""), it.get("message")))))}[kind](
                     record)
        step = record.get("step")
        rows.append([clock(record["time"]), "" if step is None else shown(step),
                     f'<span class="tag {kind}">{kind}</span>', words])
    close()
    if run.superseded:
        rows.append(["", "", "", f"{run.superseded:,} records of steps that were trained again are left out"])
    return rows


def _start_words(record: dict) -> str:
    facts = [str(record[key]) for key in ("how", "devices") if key in record]
    for key in ("mesh", "implementations"):
        if isinstance(record.get(key), dict):
            facts.append(", ".join(f"{name} {value}" for name, value in record[key].items()))
    return shown(" · ".join(facts))


def details(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Resolved config and environment, folded."""
    parts = []
    for index, run in enumerate(runs):
        label = f"{_name(names, index)} · " if len(runs) > 1 else ""
        config = run.config_text or (json.dumps(run.config, indent=2, ensure_ascii=False) if run.config else "")
        if config:
            parts.append(f"<details><summary>{label}config</summary><pre>{shown(config)}</pre></details>")
        if run.environment:
            rows = [[f"<code>{shown(key)}</code>", f"<code>{shown(value)}</code>"]
                    for key, value in flatten(run.environment).items()]
            parts.append(f"<details><summary>{label}environment</summary>{table(['key', 'value'], rows, 'config')}"
                         f"</details>")
    return section("Config and environment" if len(runs) == 1 else "Whole configs and environments",
                    "".join(parts)) if parts else ""
