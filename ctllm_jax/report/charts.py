"""Line charts as inline SVG.

A figure holds up to four drawings of the same data, over steps or tokens, over the whole run or without its first
fifth, or two, over tokens on both scales; the page shows one of them. Legends carry each line's last value, which the
page's script replaces by the value under the pointer; the numbers for that stand in the figure's `data-series`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ctllm_jax.report.readable import compact, percent, trimmed, visible

BUCKETS = 320
_LATE = 0.2
_SMOOTH_FROM = 60
_DOTS_UP_TO = 60
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 26
"""Pixels around the plot of a drawing."""


@dataclass(frozen=True)
class Series:
    """One line: a value (None if it was not finite) for each step, and tokens for the steps if known.

    `low` and `high` bound each value's interval; `dashed` is a line of others, to be compared with.
    """

    name: str
    color: int
    steps: Sequence[int]
    tokens: Sequence[float] | None
    values: Sequence[float | None]
    dots: bool = False
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line: a value to be compared with."""

    name: str
    value: float
    color: int | None = None


@dataclass(frozen=True)
class Chart:
    """The content of a figure. `kind` is the format of values: plain, compact, percent or power. `both_scales`: over
    tokens alone, of which there are some, on a linear and a logarithmic scale."""

    title: str
    series: Sequence[Series]
    note: str = ""
    levels: Sequence[Level] = ()
    restarts: Sequence[tuple[int, float | None]] = ()
    kind: str = "plain"
    log: bool = False
    from_zero: bool = False
    smooth: bool = False
    width: int = 560
    height: int = 240
    both_scales: bool = False


def spell(kind: str, value: float) -> str:
    """A value as the chart's axis, legend and pointer write it."""
    if kind == "compact":
        return compact(value)
    if kind == "percent":
        return percent(value)
    if kind == "power":
        return f"{value:.2e}"
    return f"{value:.4g}" if abs(value) < 1e-2 or abs(value) >= 1e4 else f"{value:.3f}"


def thin(values: Sequence[float | None], buckets: int = BUCKETS) -> list[int]:
    """Indices that keep the look of a line: its ends, and each bucket's lowest, highest and first missing value."""
    count = len(values)
    if count <= 3 * buckets:
        return list(range(count))
    kept = {0, count - 1}
    for bucket in range(buckets):
        first, last = bucket * count // buckets, (bucket + 1) * count // buckets
        piece = values[first:last]
        finite = [value for value in piece if value is not None]
        if finite:
            kept.update((first + piece.index(min(finite)), first + piece.index(max(finite))))
        if len(finite) < len(piece):
            kept.add(first + piece.index(None))
    return sorted(kept)


def smoothed(values: Sequence[float | None], at: Sequence[int]) -> list[float | None]:
    """Means around the values at the given indices; None if the value itself is missing.

    Three windows, the widest a fiftieth of the run, are averaged, so that a spike leaves a hill and no plateau. They
    shrink towards both ends, where the mean is the value itself.
    """
    reach = max(1, len(values) // 100)
    means: list[float | None] = []
    for index in at:
        if values[index] is None:
            means.append(None)
            continue
        near = min(reach, index, len(values) - 1 - index)
        windows = [[value for value in values[index - part:index + part + 1] if value is not None]
                   for part in (near, 2 * near // 3, near // 3)]
        means.append(sum(sum(window) / len(window) for window in windows) / len(windows))
    return means


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from low to high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from low to high, with 2 and 5 between them if there is space."""
    span = math.log10(high / low)
    factors = (1, 2, 5) if span < 3 else (1,)
    every = max(1, round(span / 5))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [10.0**power * factor for power in powers if power % every == 0 for factor in factors]
    return [tick for tick in found if low * 0.999 <= tick <= high * 1.001]


@dataclass(frozen=True)
class _Line:
    """A thinned series for drawing."""

    series: Series
    steps: list[int]
    tokens: list[float] | None
    values: list[float | None]
    means: list[float | None] | None
    bounds: list[tuple[float, float] | None]

    def over(self, axis: str) -> list:
        return self.steps if axis == "steps" else self.tokens


def _line(series: Series, smooth: bool) -> _Line:
    kept = thin(series.values)
    return _Line(
        series,
        steps=[series.steps[index] for index in kept],
        tokens=None if series.tokens is None else [series.tokens[index] for index in kept],
        values=[series.values[index] for index in kept],
        means=smoothed(series.values, kept) if smooth and len(series.values) >= _SMOOTH_FROM else None,
        bounds=[] if series.low is None else [
            None if None in (pair := (series.low[index], series.high[index])) else pair for index in kept],
    )


def figure(chart: Chart) -> str:
    """The chart as a <figure>: title, legend, drawings. Without values, a figure with a note."""
    lines = [_line(series, chart.smooth) for series in chart.series if len(series.values)]
    finite = [value for line in lines for value in line.values if value is not None]
    head = f"<figcaption><b>{escape(visible(chart.title))}</b>"
    if chart.note:
        head += f" <small>{escape(visible(chart.note))}</small>"
    if not finite:
        return f'<figure class="chart">{head}</figcaption><p class="none">No values yet.</p></figure>'
    drawings = []
    if chart.both_scales:
        drawings += [_drawing(chart, lines, "tokens", "whole", f'data-x="any" data-axis="tokens" data-span="any" '
                              f'data-scale="{scale}"', log=scale == "log") for scale in ("log", "linear")]
    else:
        axes = ["steps", "tokens"] if all(line.tokens is not None for line in lines) else ["steps"]
        drawings += [_drawing(chart, lines, axis, span, f'data-x="{axis if len(axes) == 2 else "any"}" '
                              f'data-axis="{axis}" data-span="{span}"') for axis in axes for span in ("whole", "late")]
    data = [_pointer_data(line) for line in lines]
    return (f'<figure class="chart" data-kind="{chart.kind}" '
            f'data-series="{escape(json.dumps(data, separators=(",", ":"), allow_nan=False))}">'
            f'{head}<span class="at"></span></figcaption>{_legend(chart, lines)}{"".join(drawings)}{_missing(lines)}'
            f"</figure>")


def _pointer_data(line: _Line) -> dict:
    rounded = [None if value is None else float(f"{value:.5g}") for value in line.values]
    data = {"steps": line.steps, "values": rounded}
    if line.tokens is not None:
        data["tokens"] = [int(tokens) for tokens in line.tokens]
    return data


def _legend(chart: Chart, lines: list[_Line]) -> str:
    items = []
    for line in lines:
        last = line.values[-1]
        shown = "not finite" if last is None else spell(chart.kind, last)
        looks = f"c{line.series.color}" + " dashed" * line.series.dashed
        items.append(f'<li class="{looks}"><i></i>{escape(visible(line.series.name))} '
                     f"<output>{shown}</output></li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _missing(lines: list[_Line]) -> str:
    told = []
    for line in lines:
        steps = [step for step, value in zip(line.series.steps, line.series.values, strict=True) if value is None]
        if steps:
            some = ", ".join(f"{step:,}" for step in steps[:4]) + (", …" if len(steps) > 4 else "")
            whose = f"{escape(visible(line.series.name))}: " if line.series.name else ""
            told.append(f"{whose}{len(steps):,} not finite (step {some})")
    return f'<p class="missing">× {"; ".join(told)}</p>' if told else ""


class Scale:
    """Values to pixels, linear or logarithmic."""

    def __init__(self, low: float, high: float, start: float, stop: float, log: bool = False):
        self.low, self.high, self.start, self.stop, self.log = low, high, start, stop, log

    def __call__(self, value: float) -> float:
        if self.log:
            part = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return round(self.start + part * (self.stop - self.start), 1)


def _drawing(chart: Chart, lines: list[_Line], axis: str, span: str, attributes: str, *, log: bool = False) -> str:
    across = [value for line in lines for value in line.over(axis)]
    left, right = min(across), max(across)
    if span == "late":
        left += (right - left) * _LATE
    if right <= left:
        left, right = (left / 2, right * 2) if log else (left - 1, right + 1)
    x = Scale(left, right, LEFT, chart.width - RIGHT, log=log)
    shown = [value for line in lines for at, value in zip(line.over(axis), line.values, strict=True)
             if value is not None and at >= left]
    shown += [bound for line in lines for pair in line.bounds if pair is not None for bound in pair]
    shown = shown or [value for line in lines for value in line.values if value is not None]
    # The later part is looked at closely: a level far off would press its lines flat.
    y = _vertical(chart, shown if span == "late" else [*shown, *(level.value for level in chart.levels)])
    levels = [level for level in chart.levels if y.low <= level.value <= y.high]
    parts = [_grid(chart, x, y, axis), *_restarts(chart, x, axis)]
    parts += [_level(chart, level, y, shift) for level, shift in _spread(levels, y)]
    for line in lines:
        parts += _strokes(line, x, y, axis, chart)
    plot_height = chart.height - TOP - BOTTOM
    label = escape(f"{visible(chart.title)} over {axis}")
    return (f'<svg viewBox="0 0 {chart.width} {chart.height}" role="img" aria-label="{label}" {attributes} '
            f'data-domain="{x.low:.10g} {x.high:.10g} {y.low:.6g} {y.high:.6g} {int(y.log)}{" 1" * log}" '
            f'data-plot="{LEFT} {TOP} {chart.width - LEFT - RIGHT} {plot_height}">{"".join(parts)}</svg>')


def _vertical(chart: Chart, values: list[float]) -> Scale:
    top, bottom = TOP, chart.height - BOTTOM
    low, high = min(values), max(values)
    if high - low < 1e-9 * abs(high):
        low = high
    if chart.log and low > 0 and high / low > 8:
        room = (high / low) ** 0.06
        return Scale(low / room, high * room, bottom, top, log=True)
    if chart.from_zero:
        low = min(low, 0.0)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Scale(low if chart.from_zero and low == 0 else low - room, high + room, bottom, top)


def _grid(chart: Chart, x: Scale, y: Scale, axis: str) -> str:
    bottom, right = chart.height - BOTTOM, chart.width - RIGHT
    parts = []
    levels = log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high, max(3, chart.height // 38))
    step = min((b - a for a, b in zip(levels, levels[1:], strict=False)), default=1.0)
    for value in levels:
        at = y(value)
        parts.append(f'<path class="gridline" d="M{LEFT} {at}H{right}"/>'
                     f'<text class="tick" x="{LEFT - 7}" y="{at + 3.5}" text-anchor="end">'
                     f"{_tick(chart.kind, value, step, y.log)}</text>")
    across = log_ticks(x.low, x.high) if x.log else []
    if len(across) < 2:  # Between two powers of ten round numbers are farther apart than the ends.
        across = ticks(x.low, x.high, max(2, chart.width // 85))
    for value in across:
        at, last = x(value), value == across[-1]
        edge = last and at > right - 36
        place = f'x="{right if edge else at}" y="{bottom + 17}" text-anchor="{"end" if edge else "middle"}"'
        parts.append(f'<path class="axis" d="M{at} {bottom}v4"/><text class="tick" {place}>'
                     f"{trimmed(value)}{f' {axis}' if last else ''}</text>")
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    return "".join(parts)


def _tick(kind: str, value: float, step: float, log: bool) -> str:
    if kind == "compact":
        return trimmed(value)
    if kind == "percent":
        return f"{value * 100:.{0 if step >= 0.00999 else 1}f}%"
    if log or value == 0:
        return f"{value:g}"
    if kind == "power" or abs(step) < 1e-4:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    decimals = next(places for places in range(6) if places == 5 or abs(round(step, places) - step) < step * 1e-6)
    return f"{value:,.{decimals}f}"


def _restarts(chart: Chart, x: Scale, axis: str) -> list[str]:
    found = []
    for step, tokens in chart.restarts:
        at = step if axis == "steps" else tokens
        if at is not None and x.low < at <= x.high:
            found.append(f'<path class="restart" d="M{x(at)} {TOP}V{chart.height - BOTTOM}">'
                         f"<title>resumed at step {step:,}</title></path>")
    return found


def _spread(levels: Sequence[Level], y: Scale) -> list[tuple[Level, float]]:
    """The levels from the top down, each with how far its label moves so that no two overlap."""
    placed, lowest = [], -math.inf
    for level in sorted(levels, key=lambda level: -level.value):
        baseline = max(y(level.value) - 4, lowest + 12)
        lowest = baseline
        placed.append((level, baseline))
    return placed


def _level(chart: Chart, level: Level, y: Scale, baseline: float) -> str:
    right = chart.width - RIGHT
    color = "" if level.color is None else f" c{level.color}"
    return (f'<path class="level{color}" d="M{LEFT} {y(level.value)}H{right}"/>'
            f'<text class="label{color}" x="{right - 2}" y="{round(baseline, 1)}" text-anchor="end">'
            f"{escape(visible(level.name))} {spell(chart.kind, level.value)}</text>")


def _strokes(line: _Line, x: Scale, y: Scale, axis: str, chart: Chart) -> list[str]:
    color = f"c{line.series.color}" + " dashed" * line.series.dashed
    at = line.over(axis)
    first = next((index for index, value in enumerate(at) if value >= x.low), len(at))
    at = at[first:]
    values = line.values[first:]
    parts = []
    spans = [f"M{x(place)} {y(pair[0])}V{y(pair[1])}"
             for place, pair in zip(at, line.bounds[first:], strict=False) if pair]
    if spans:
        parts.append(f'<path class="span {color}" d="{"".join(spans)}"><title>95 % interval</title></path>')
    if line.means is None:
        parts.append(f'<path class="line {color}" d="{_path(at, values, x, y)}"/>')
    else:
        parts.append(f'<path class="raw {color}" d="{_path(at, values, x, y)}"/>')
        parts.append(f'<path class="line mean {color}" d="{_path(at, line.means[first:], x, y)}"/>')
    if line.series.dots and len(values) <= _DOTS_UP_TO or len(values) == 1:
        parts += [f'<circle class="{color}" cx="{x(place)}" cy="{y(value)}" r="2.6"/>'
                  for place, value in zip(at, values, strict=True) if value is not None]
    missing = [x(place) for place, value in zip(at, values, strict=True) if value is None]
    if missing:
        marks = "".join(f"M{round(place - 3, 1)} {TOP}l6 6m0 -6l-6 6" for place in missing)
        parts.append(f'<path class="cross {color}" d="{marks}"><title>not a finite number</title></path>')
    return parts


def _path(at: Sequence[float], values: Sequence[float | None], x: Scale, y: Scale) -> str:
    """Points joined by lines, with a gap where a value is missing."""
    pieces, pen = [], "M"
    for place, value in zip(at, values, strict=True):
        if value is None:
            pen = "M"
        else:
            pieces.append(f"{pen}{x(place)} {y(value)}")
            pen = "L"
    return "".join(pieces)
