"""Charts of many values at once, as inline SVG: histograms that mark the values outside bounds, curves, counts of
sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ctllm_jax.report.charts import BOTTOM, LEFT, RIGHT, TOP, Scale, log_ticks, ticks
from ctllm_jax.report.readable import compact, trimmed, visible

_SMALLEST = 1.5
"""Height in pixels of a bar with a single value, so that rare values stay visible near a threshold."""


@dataclass(frozen=True)
class Histogram:
    """Counts of values between edges, and the bounds that values must keep to (None: open on that side).

    `len(edges) == len(counts) + 1`; edges ascend. Values beyond the edges are in the end bins. Edges in equal
    proportion are drawn on a logarithmic axis. `above`: values must be over the low bound, not at it. `failed` is how
    many values the bounds cut off: it decides for an end bin whose outer edge is a bound, as with 0 and 1 where only 1
    is kept.
    """

    title: str
    edges: Sequence[float]
    counts: Sequence[int]
    low: float | None = None
    high: float | None = None
    above: bool = False
    failed: int | None = None
    width: int = 420
    height: int = 170


def histogram(chart: Histogram) -> str:
    """The histogram as an <svg> pair, of counts and of their logarithms; the page shows one of them.

    Bars of values that the bounds cut off are of class `cut`; each bound is a dashed line with its number.
    """
    return "".join(_drawing(chart, log) for log in (False, True))


def _drawing(chart: Histogram, log: bool) -> str:
    edges, most = chart.edges, max(chart.counts, default=0)
    x = Scale(edges[0], edges[-1], LEFT, chart.width - RIGHT, log=_is_geometric(edges))
    bottom, top = chart.height - BOTTOM, TOP + 12
    kept, cut = [], []
    for index, count in enumerate(chart.counts):
        if not count:
            continue
        share = math.log1p(count) / math.log1p(most) if log else count / most
        height = round(max(_SMALLEST, share * (bottom - top)), 1)
        for first, last, stays in _parts(index, chart):
            # A gap of half a pixel between bars, but none inside one that a bound divides.
            left, right = x(first), max(x(last) - (0.6 if last == edges[index + 1] else 0), x(first) + 0.4)
            (kept if stays else cut).append(f"M{left} {bottom}v-{height}H{round(right, 1)}v{height}z")
    parts = [_vertical(chart, most, log, bottom, top), _horizontal(x, chart, bottom)]
    parts += [f'<path class="{name}" d="{"".join(paths)}"/>' for name, paths in (("bars", kept), ("bars cut", cut))
              if paths]
    parts += [_bound(value, side, x, chart, bottom) for side, value in (("low", chart.low), ("high", chart.high))
              if value is not None]
    label = escape(f"{visible(chart.title)}: documents by value")
    return (f'<svg viewBox="0 0 {chart.width} {chart.height}" role="img" aria-label="{label}" '
            f'data-counts="{"log" if log else "linear"}">{"".join(parts)}</svg>')


def _is_geometric(edges: Sequence[float]) -> bool:
    if edges[0] <= 0 or len(edges) < 3:
        return False
    first, last = edges[1] / edges[0], edges[-1] / edges[-2]
    return first > 1.05 and abs(first - last) < 0.01 * first


def _parts(index: int, chart: Histogram) -> list[tuple[float, float, bool]]:
    """A bin, divided at a bound inside it; and whether each part is kept."""
    start, stop = chart.edges[index:index + 2]
    bounds = [bound for bound in (chart.low, chart.high) if bound is not None]
    outer = {0: start, len(chart.counts) - 1: stop}.get(index)
    if chart.failed is not None and outer in bounds:
        others = sum(count for other, count in enumerate(chart.counts)
                     if other != index and not _is_kept(other, chart))
        return [(start, stop, 2 * (chart.failed - others) < chart.counts[index])]
    points = [start, *sorted(bound for bound in bounds if start < bound < stop), stop]
    return [(first, last, _keeps((first + last) / 2, chart)) for first, last in zip(points, points[1:], strict=False)]


def _is_kept(index: int, chart: Histogram) -> bool:
    return _keeps((chart.edges[index] + chart.edges[index + 1]) / 2, chart)


def _keeps(value: float, chart: Histogram) -> bool:
    return (chart.low is None or value >= chart.low) and (chart.high is None or value <= chart.high)


def _horizontal(x: Scale, chart: Histogram, bottom: int) -> str:
    found = log_ticks(x.low, x.high) if x.log else ticks(x.low, x.high, max(2, chart.width // 85))
    if x.log and len(found) > 8:
        found = [value for value in found if math.log10(value) % 1 == 0]
    marks = "".join(f'<path class="axis" d="M{x(value)} {bottom}v4"/><text class="tick" x="{x(value)}" '
                    f'y="{bottom + 17}" text-anchor="middle">{_spelled(value)}</text>' for value in found)
    return f'<path class="axis" d="M{LEFT} {bottom}H{chart.width - RIGHT}"/>{marks}'


def _spelled(value: float) -> str:
    return trimmed(value) if abs(value) >= 1000 else f"{value:.6g}"


def _vertical(chart: Histogram, most: int, log: bool, bottom: int, top: int) -> str:
    if not most:
        return ""
    if log:
        marks = {10.0**power: math.log1p(10.0**power) / math.log1p(most)
                 for power in range(math.floor(math.log10(most)) + 1)} if most > 1 else {1: 1.0}
    else:
        marks = {value: value / most for value in ticks(0, most, 3) if value and value == int(value)}
    return "".join(f'<path class="gridline" d="M{LEFT} {round(bottom - share * (bottom - top), 1)}'
                   f'H{chart.width - RIGHT}"/><text class="tick" x="{LEFT - 7}" '
                   f'y="{round(bottom - share * (bottom - top) + 3.5, 1)}" text-anchor="end">{trimmed(value)}</text>'
                   for value, share in marks.items())


def _bound(value: float, side: str, x: Scale, chart: Histogram, bottom: int) -> str:
    """A threshold; one outside the range is drawn at the edge, with an arrow."""
    beyond = "‹ " if value < x.low else " ›" if value > x.high else ""
    at = x(min(max(value, x.low), x.high))
    sign, anchor, shift = (">" if chart.above else "≥", "start", 4) if side == "low" else ("≤", "end", -4)
    if anchor == "start" and at > chart.width - 70 or anchor == "end" and at < LEFT + 40:
        anchor, shift = ("end", -4) if anchor == "start" else ("start", 4)
    text = f"{sign} {_spelled(value)}"
    text = beyond + text if beyond == "‹ " else text + beyond
    return (f'<path class="bound" data-bound="{side} {value:g}" d="M{at} {TOP - 2}V{bottom}"/>'
            f'<text class="label" x="{at + shift}" y="{TOP + 7}" text-anchor="{anchor}">{escape(text)}</text>')


def curve(title: str, points: Sequence[Sequence[float]], marks: Sequence[tuple[float, str]] = (), *, width: int = 420,
          height: int = 200) -> str:
    """A line through (x, y) points of [0, 1] × [0, 1] as an <svg>, with vertical dashed lines (x, words)."""
    x, y = Scale(0, 1, LEFT, width - RIGHT), Scale(0, 1, height - BOTTOM, TOP)
    bottom = height - BOTTOM
    grid = "".join(f'<path class="gridline" d="M{LEFT} {y(share)}H{width - RIGHT}"/><text class="tick" x="{LEFT - 7}" '
                   f'y="{y(share) + 3.5}" text-anchor="end">{share:.0%}</text>' for share in (0, .25, .5, .75, 1))
    across = "".join(f'<path class="axis" d="M{x(value)} {bottom}v4"/><text class="tick" x="{x(value)}" '
                     f'y="{bottom + 17}" text-anchor="middle">{value:g}</text>' for value in (0, .2, .4, .6, .8, 1))
    line = "".join(f"{'L' if index else 'M'}{x(left)} {y(up)}" for index, (left, up) in enumerate(points))
    lines = "".join(f'<path class="bound" d="M{x(at)} {TOP}V{bottom}"/><text class="label" x="{x(at) - 4}" '
                    f'y="{TOP + 10 + 13 * index}" text-anchor="end">{escape(visible(words))}</text>'
                    for index, (at, words) in enumerate(marks))
    return (f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(visible(title))}">{grid}{across}'
            f'<path class="axis" d="M{LEFT} {bottom}H{width - RIGHT}"/><path class="line c0" d="{line}"/>{lines}</svg>')


def size_bars(sizes: Sequence[Sequence[int]]) -> list[tuple[str, int]]:
    """(size, count) pairs as bars: 2, 3, 4, then doubling ranges; those between the first and the last may be 0."""
    bars: dict[tuple[int, int], int] = {}
    largest = max((size for size, _ in sizes), default=0)
    start = 2
    while start <= largest:
        stop = start + 1 if start < 5 else 2 * start
        bars[start, stop] = sum(count for size, count in sizes if start <= size < stop)
        start = stop
    return [(str(first) if stop == first + 1 else f"{first:,}–{stop - 1:,}", count)
            for (first, stop), count in bars.items()]


def bar_list(bars: Sequence[tuple[str, int]], *, note: Sequence[str] = ()) -> str:
    """Horizontal bars, a row each: name, bar, number; `note` gives each a further cell."""
    most = max((count for _, count in bars), default=0)
    rows = "".join(
        f'<li><span>{escape(visible(name))}</span><i style="width:{100 * count / most if most else 0:.1f}%"></i>'
        f"<b>{compact(count)}</b>{f'<small>{escape(visible(note[index]))}</small>' if note else ''}</li>"
        for index, (name, count) in enumerate(bars))
    return f'<ul class="bars-list">{rows}</ul>' if rows else ""
