"""The page: one self-contained HTML file of one run, or of several side by side.

It loads nothing: charts are inline SVG, style and script are inside the page, and a content policy refuses
everything else, so that text written by a model, or by whoever wrote its data, can do nothing there. Times are UTC.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from statistics import median

from ctllm_jax.config.errors import UserError
from ctllm_jax.report import tables
from ctllm_jax.report.charts import Chart, Level, Series, figure
from ctllm_jax.report.comparison import compares_answers
from ctllm_jax.report.comparison import held_out as held_out_by_group
from ctllm_jax.report.goodput import section as goodput
from ctllm_jax.report.readable import clock, compact, duration, finite, percent, visible
from ctllm_jax.report.run import Run, final_loss, labels, read_run
from ctllm_jax.report.sentiment import sentiment
from ctllm_jax.storage import is_remote, open_path, told, write_whole

_STYLE = Path(__file__).with_name("page.css")
_SCRIPT = Path(__file__).with_name("page.js")
_STATES = ("done", "stopped", "preempted", "interrupted", "failed", "diverged", "unfinished", "empty")
_LIMIT = 1e30
_SMALL = 260


def write_report(run_dirs: Sequence[str | Path], output: str | Path, *, benchmarks: Sequence[Chart] = ()) -> Path:
    """Write the report of one or several run directories to `output`, and return its path.

    `benchmarks` are charts over tokens, one a benchmark. The file is replaced at once or not at all. Raises UserError
    for a path that is not a run directory, for one given twice, and for an output that cannot be written.
    """
    directories = [open_path(directory) for directory in run_dirs]
    if not directories:
        raise UserError("a report needs at least one run directory")
    for index, directory in enumerate(directories):
        if directory.resolve() in [other.resolve() for other in directories[:index]]:
            raise UserError(f"{directory}: given twice; each run is compared once")
    page = render([read_run(directory) for directory in directories], benchmarks)
    return save(page, output)


def save(page: str, output: str | Path) -> Path:
    """Write a page to a file atomically, and return its path. Raises UserError on failure."""
    output = open_path(output)
    if is_remote(output):
        with told(output):
            output.write_text(page, encoding="utf-8")
        return output
    if output.is_dir():
        raise UserError(f"{output}: a directory; the report is a file, such as {output / 'report.html'}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, page.encode("utf-8"))
    except OSError as error:
        raise UserError(f"{output}: the report cannot be written ({error.strerror})") from error
    return output


def render(runs: Sequence[Run], benchmarks: Sequence[Chart] = ()) -> str:
    """The page of these runs as HTML text; `benchmarks` are charts over tokens, on both scales."""
    names = labels([run.directory for run in runs])
    heads = "".join(_head(run, name, index, len(runs) > 1)
                    for index, (run, name) in enumerate(zip(runs, names, strict=True)))
    body = [
        f'<header><h1>{len(runs)} runs compared</h1><div class="heads">{heads}</div></header>' if len(runs) > 1
        else f"<header>{heads}</header>",
        tables.problems(runs, names),
        "".join(_cards(run) for run in runs) if len(runs) == 1 else tables.overview(runs, names),
        _charts(runs, names),
        _benchmarks(benchmarks),
        tables.evaluation(runs, names),
        sentiment(runs, names),
        tables.config_differences(runs, names),
        tables.samples(runs, names),
        tables.data(runs, names),
        goodput(runs, names),
        tables.stages(runs, names),
        tables.events(runs, names),
        tables.details(runs, names),
    ]
    return frame(" · ".join(names), body)


def frame(title: str, body: Sequence[str]) -> str:
    """A page around sections that are HTML already: style and script in it, and a policy that lets nothing else in."""
    style, script = _STYLE.read_text(encoding="utf-8"), _SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    return (f'<!doctype html>\n<html lang="en" data-x="steps" data-span="whole" data-counts="linear" data-scale="log">'
            f"<head>"
            f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
            f"<title>{tables.shown(title)}</title><style>{style}</style></head>\n<body><main>"
            + "\n".join(part for part in body if part) + f"</main><script>{script}</script></body></html>\n")


def _head(run: Run, name: str, index: int, several: bool) -> str:
    state = run.state if run.state in _STATES else "unfinished"
    words = {"done": "done", "unfinished": "no end recorded", "empty": "no numbers yet"}.get(state, run.state)
    facts = []
    if run.start:
        how = {"init": "from given weights", "scratch": "from scratch"}.get(str(run.starts[0].get("how")), "")
        times = len(run.starts) - 1
        facts.append(how + (f", resumed {'once' if times == 1 else f'{times} times'}" if times else ""))
        facts.append(str(run.start.get("devices", "")))
        facts.append(f"started {clock(run.starts[0]['time'])}")
    if run.last_time is not None:
        facts.append(f"last entry {clock(run.last_time)} UTC")
    swatch = f'<i class="swatch c{index % 8}"></i>' if several else ""
    heading = "h2" if several else "h1"
    return (f'<div class="head"><{heading}>{swatch}{escape(visible(name))}'
            f'<span class="state {state}">{escape(visible(words))}</span></{heading}>'
            f"<p>{escape(visible(' · '.join(fact for fact in facts if fact)))}</p></div>")


def _cards(run: Run) -> str:
    """The headline figures of a single run."""
    cards = []
    if (final := final_loss(run)) is not None:
        cards.append(("final loss", "not finite" if final.value is None else f"{final.value:.3f}",
                      f"mean of the last {final.records:,} records, steps {final.first:,} to {final.last:,}"
                      if final.records > 1 else f"of the one batch of step {final.last:,}"))
    if run.evaluation and "rewards/margins" in run.evaluation[-1]:
        found = held_out_by_group(run)[""]
        cards.append(("held-out accuracy", percent(found.get("rewards/accuracies", 0.0)),
                      f"{found.get('pairs', 0):,.0f} pairs, margin {found.get('rewards/margins', 0.0):.3f}"))
    for source, values in (run.evaluation[-1]["sources"] if run.evaluation else {}).items():
        bits = finite(values.get("bits_per_byte"))
        if bits is not None:
            cards.append((f"bits per byte · {source}", f"{bits:.3f}", tables.against_baselines(run, source)))
    if run.train:
        tokens = run.tokens_at(run.train[-1])
        steps = finite(run.start.get("steps"))
        reached = f"step {run.step:,}" + (f" of {steps:,.0f}" if steps else "")
        cards.append(("tokens", "–" if tokens is None else compact(tokens), reached))
    if run.seconds:
        cards.append(("time", duration(run.seconds), f"in {len(run.starts)} attempts" if len(run.starts) > 1 else
                      "from start line to last entry"))
    skipped = {key: run.train[-1].get(key) for key in ("bad_steps", "spikes")} if run.train else {}
    if any(skipped.values()):
        back = sum(event["event"] == "rollback" for event in run.events)
        cards.append(("steps skipped", f"{sum(filter(None, skipped.values())):,}",
                      f"{skipped['bad_steps'] or 0:,} not finite" + (f", {skipped['spikes']:,} spikes" if
                      skipped["spikes"] else "") + (f"; {back} rollback{'s' * (back > 1)}" if back else "")))
    speed = typical(run, "tokens_per_second")
    if speed is not None:
        causal, full = typical(run, "mfu_causal"), typical(run, "mfu_full")
        known_mfu = [f"{percent(value)} {how}" for value, how in ((causal, "causal"), (full, "full"))
                     if value is not None]
        cards.append(("tokens/s", compact(speed), "MFU " + ", ".join(known_mfu) if known_mfu else "median"))
    parameters = finite(run.start.get("parameters"))
    if parameters is not None:
        cards.append(("parameters", compact(parameters), f"{parameters:,.0f}"))
    return tables.cards(cards)


def typical(run: Run, key: str) -> float | None:
    """The median of a quantity over the run's training records, or None."""
    values = [value for record in run.train if (value := finite(record.get(key))) is not None]
    return median(values) if values else None


def _series(run: Run, name: str, color: int, records: list[dict], read, dots: bool = False) -> Series:
    """One line of `read(record)`, over the records that speak of it at all (`read` gives ... where not)."""
    values = [read(record) for record in records]
    if ... in values:
        records = [record for record, value in zip(records, values, strict=True) if value is not ...]
        values = [value for value in values if value is not ...]
    if records is run.train:
        steps, tokens = run.train_axes
    else:
        steps, tokens = [record["step"] for record in records], [run.tokens_at(record) for record in records]
    values = [value if type(value) is float and -_LIMIT < value < _LIMIT else _within_limit(value) for value in values]
    return Series(name, color % 8, steps, None if None in tokens else tokens, values, dots)


def _within_limit(value: object) -> float | None:
    number = finite(value)
    return None if number is None else min(max(number, -_LIMIT), _LIMIT)


def _charts(runs: Sequence[Run], names: Sequence[str]) -> str:
    if not any(run.train or run.evaluation for run in runs):
        return ""
    several = len(runs) > 1
    restarts = [] if several else [(start["step"], runs[0].tokens_at({"step": start["step"]}))
                                   for start in runs[0].starts[1:]]

    def trained(title: str, key: str, **looks) -> Chart:
        lines = [_series(run, name if several else "", index, run.train, lambda it: it.get(key, ...))
                 for index, (run, name) in enumerate(zip(runs, names, strict=True))]
        return Chart(title, lines, restarts=restarts, **looks)

    compares = any(compares_answers(run) for run in runs)
    charts = [trained("Training loss", "loss", note="per pair" if compares else "nats per token", smooth=True)]
    if compares:
        charts += _preferences(runs, names, trained)
    else:
        charts += _bits(runs, names, restarts)
    small = {"width": _SMALL, "height": 160}
    charts.append(trained("Learning rate", "lr", kind="power", from_zero=True, **small))
    charts.append(trained("Gradient norm", "grad_norm", note="before clipping", smooth=True, log=True, **small))
    charts.append(trained("Throughput", "tokens_per_second", note="tokens/s", kind="compact", from_zero=True,
                          smooth=True, **small))
    charts.append(trained("Data wait", "data_wait", note="share of a step", kind="percent",
                          from_zero=True, smooth=True, **small))
    if any("z_loss" in record for run in runs for record in run.train[-1:]):
        charts.append(trained("z-loss", "z_loss", smooth=True, **small))
    large = [chart for chart in charts if chart.width > _SMALL]
    rest = [chart for chart in charts if chart.width <= _SMALL]
    return (f'<section id="charts">{_switches()}<div class="grid large">{"".join(map(figure, large))}</div>'
            f'<div class="grid small">{"".join(map(figure, rest))}</div></section>')


def _switches() -> str:
    return ('<div class="switches"><h2>Training</h2>' + tables.switch("x", {"steps": "steps", "tokens": "tokens"})
            + tables.switch("span", {"whole": "whole run", "late": "last 80%"}) + "</div>")


def _benchmarks(charts: Sequence[Chart]) -> str:
    """Benchmark results of the runs during training."""
    if not charts:
        return ""
    switches = tables.switch("scale", {"log": "log tokens", "linear": "linear tokens"})
    return (f'<section id="benchmarks"><div class="switches"><h2>Benchmarks</h2>{switches}</div>'
            f'<div class="grid large">{"".join(map(figure, charts))}</div></section>')


def _preferences(runs: Sequence[Run], names: Sequence[str], trained: Callable[..., Chart]) -> list[Chart]:
    """Accuracy and margin: training and held out on one chart of a single run, on two of several; of groups, if any."""
    several = len(runs) > 1
    groups = list(dict.fromkeys(group for run in runs for group in held_out_by_group(run) if group))
    looks = {"rewards/accuracies": ("Reward accuracy", "pairs whose chosen answer is ahead",
                                    {"kind": "percent", "from_zero": True}),
             "rewards/margins": ("Reward margin", "chosen less rejected", {})}

    def reached(run: Run, name: str, color: int, key: str, group: str) -> Series:
        return _series(run, name, color, run.evaluation,
                       lambda it: held_out_by_group(run, it).get(group, {}).get(key, ...), dots=True)

    charts = []
    for key, (title, note, look) in looks.items():
        chart = trained(title, key, note=note, smooth=True, **look)
        if not any("rewards/margins" in record for run in runs for record in run.evaluation[-1:]):
            charts.append(chart)
        elif several:
            charts.append(replace(chart, title=f"{title}, training"))
            for group in ["", *(groups if len(groups) > 1 else [])]:
                lines = [reached(run, name, index, key, group)
                         for index, (run, name) in enumerate(zip(runs, names, strict=True))]
                charts.append(Chart(f"{title}, held out{f' · {group}' if group else ''}", lines, note=note, **look))
        else:
            lines = [replace(chart.series[0], name="train"), reached(runs[0], "held out", 1, key, "")]
            lines += [reached(runs[0], f"held out · {group}", 2 + index, key, group)
                      for index, group in enumerate(groups if len(groups) > 1 else [])]
            charts.append(replace(chart, series=lines))
    return charts


def _bits(runs: Sequence[Run], names: Sequence[str], restarts: list) -> list[Chart]:
    """Bits per byte: one chart of a single run with few sources, else one for each source and one for training."""
    several = len(runs) > 1
    if several:
        sources = list(dict.fromkeys(group for run in runs for record in [*run.evaluation[-1:], *run.evaluation[:1]]
                                     for group in held_out_by_group(run, record)))
    else:
        sources = runs[0].sources
    train = [_series(run, names[index] if several else "train", index, run.train,
                     lambda it: it.get("bits_per_byte", ...)) for index, run in enumerate(runs)]

    def held_out(run: Run, name: str, color: int, source: str) -> Series:
        def read(record: dict) -> object:
            found = held_out_by_group(run, record) if several else record["sources"]
            return found.get(source, {}).get("bits_per_byte", ...)

        return _series(run, name, color, run.evaluation, read, dots=True)

    if not several and len(sources) <= 2:
        lines = train + [held_out(runs[0], f"held out · {source}" if len(sources) > 1 else "held out", 1 + index,
                                  source) for index, source in enumerate(sources)]
        levels = [Level(f"{name} · {source}" if len(sources) > 1 else name, value,
                        1 + index if len(sources) > 1 else None)
                  for index, source in enumerate(sources) for name, value in tables.baselines_of(runs[0], source)]
        return [Chart("Bits per byte", lines, levels=levels, restarts=restarts, smooth=True, note="lower is better")]
    charts = [Chart("Bits per byte, training", train, restarts=restarts, smooth=True)]
    for source in sources:
        lines = [held_out(run, names[index] if several else "held out", index if several else 1, source)
                 for index, run in enumerate(runs)]
        pairs = dict.fromkeys(pair for run in runs for pair in tables.baselines_of(run, source))
        charts.append(Chart(f"Bits per byte, held out · {source}", lines, restarts=restarts,
                            levels=[Level(name, value) for name, value in pairs]))
    return charts
