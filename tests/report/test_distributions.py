"""Histograms with their bounds, curves, and counts of sizes."""

import re

import pytest

from ctllm_jax.report.distributions import Histogram, bar_list, curve, histogram, size_bars

TENTHS = [index / 10 for index in range(11)]


def bars(svg, kind):
    """(left, right, height) of the bars of a class in the first drawing."""
    found = re.search(rf'class="{kind}" d="([^"]*)"', svg.split("</svg>")[0])
    return [tuple(map(float, (left, right, height))) for left, height, right in
            re.findall(r"M([\d.]+) [\d.]+v-([\d.]+)H([\d.]+)", found.group(1))] if found else []


def test_bars_stand_side_by_side_in_proportion_to_their_counts():
    found = bars(histogram(Histogram("a", TENTHS, [0, 10, 20, 0, 0, 0, 0, 0, 0, 5])), "bars")
    assert [round(height / found[1][2], 2) for _, _, height in found] == [0.5, 1, 0.25]
    assert found[0][1] <= found[1][0] < found[0][1] + 1
    assert found[2][1] == pytest.approx(410, abs=1)


def test_both_bounds_are_drawn_and_what_they_cut_off_is_marked():
    svg = histogram(Histogram("a", TENTHS, [10] * 10, low=0.2, high=0.75))
    assert re.findall(r'data-bound="(\w+) ([\d.]+)"', svg) == [("low", "0.2"), ("high", "0.75")] * 2
    assert "≥ 0.2" in svg and "≤ 0.75" in svg
    assert len(bars(svg, "bars cut")) == 2 + 2 + 1 and len(bars(svg, "bars")) == 5 + 1
    # The bin of 0.7 … 0.8 is divided at 0.75, where the line is.
    line = float(re.search(r'data-bound="high 0.75" d="M([\d.]+)', svg).group(1))
    assert bars(svg, "bars")[-1][1] == line == bars(svg, "bars cut")[2][0]


def test_one_document_among_a_million_is_seen_and_stands_higher_on_the_logarithm():
    linear, log = histogram(Histogram("a", TENTHS, [10**6] + [0] * 8 + [1], high=0.5)).split("</svg>")[:2]
    assert 'data-counts="linear"' in linear and 'data-counts="log"' in log
    assert bars(linear, "bars cut")[0][2] == 1.5
    assert bars(log, "bars cut")[0][2] > 5


def test_edges_in_proportion_are_drawn_on_a_logarithmic_axis():
    edges = [10 ** (index / 4) for index in range(17)]
    found = bars(histogram(Histogram("a", edges, [1] * 16, low=100)), "bars cut")
    widths = [right - left for left, right, _ in found]
    assert len(found) == 8 and max(widths) - min(widths) < 0.5


@pytest.mark.parametrize(("counts", "bounds", "failed", "kept", "cut"), [
    ([16] + [0] * 8 + [400], {"low": 1}, 16, [9], [0]),    # 0 or 1, where only 1 is kept
    ([400] + [0] * 8 + [3], {"high": 0}, 3, [0], [9]),     # 0 or 1, where only 0 is kept
    ([20] + [30] + [0] * 8, {"low": 0, "above": True}, 20, [1], [0]),
    ([20] + [30] + [0] * 8, {"low": 0, "above": True}, 2, [0, 1], []),
])
def test_an_end_bin_at_a_bound_goes_by_how_many_failed(counts, bounds, failed, kept, cut):
    svg = histogram(Histogram("a", TENTHS, counts, failed=failed, **bounds))
    for kind, expected in (("bars", kept), ("bars cut", cut)):
        assert [round((left - 46) / 36.4) for left, _, _ in bars(svg, kind)] == expected
    assert ("&gt; 0" in svg) == bool(bounds.get("above"))


def test_a_bound_beyond_the_edges_stands_at_the_edge():
    svg = histogram(Histogram("a", TENTHS, [1] * 10, low=-5, high=7))
    assert "‹ ≥ -5" in svg and "≤ 7 ›" in svg
    assert len(bars(svg, "bars")) == 10 and not bars(svg, "bars cut")


def test_without_counts_there_are_bounds_and_an_axis():
    svg = histogram(Histogram("<a>", TENTHS, [0] * 10, low=0.5))
    assert 'data-bound="low 0.5"' in svg and not bars(svg, "bars") and "<a>" not in svg


def test_a_curve_goes_through_its_points():
    svg = curve("<found>", [(0, 0), (0.5, 0.25), (1, 1)], [(0.5, "half & half")])
    path = re.search(r'class="line c0" d="([^"]*)"', svg).group(1)
    assert path == "M46.0 174.0L228.0 133.5L410.0 12.0"
    assert "half &amp; half" in svg and "<found>" not in svg


def test_sizes_are_gathered_into_doubling_ranges():
    assert size_bars([[2, 48], [3, 12], [4, 5], [7, 3], [9, 1], [40, 1]]) == [
        ("2", 48), ("3", 12), ("4", 5), ("5–9", 4), ("10–19", 0), ("20–39", 0), ("40–79", 1)]
    assert size_bars([]) == []


def test_a_list_of_bars_is_as_wide_as_its_counts():
    found = bar_list([("zh", 200), ("<en>", 50), ("ja", 0)], note=["1MB", "2kB", "0B"])
    assert re.findall(r"width:([\d.]+)%", found) == ["100.0", "25.0", "0.0"]
    assert "&lt;en&gt;" in found and "2kB" in found
    assert bar_list([]) == ""
