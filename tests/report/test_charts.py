"""Charts: what thinning keeps, gaps, scales."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctllm_jax.report.charts import BUCKETS, Chart, Level, Series, figure, log_ticks, smoothed, thin, ticks


def series(values, **settings):
    steps = list(range(1, len(values) + 1))
    return Series("loss", 0, steps, [step * 100.0 for step in steps], values, **settings)


def points(html):
    """Numbers of points of every drawn path of a line."""
    return [len(re.findall("[ML]", path)) for path in re.findall(r'<path class="(?:line|raw)[^"]*" d="([^"]*)"', html)]


def test_thinning_keeps_ends_and_extremes_of_a_long_line():
    values = [math.sin(index / 900) for index in range(100_000)]
    values[54_321] = 40.0
    values[54_322] = -40.0
    values[77_777] = None
    kept = thin(values)
    assert len(kept) <= 3 * BUCKETS + 2
    assert {0, 99_999, 54_321, 54_322, 77_777} <= set(kept)
    assert kept == sorted(set(kept))


@given(st.lists(st.one_of(st.none(), st.floats(-1e30, 1e30)), min_size=1, max_size=60), st.integers(1, 5))
def test_thinning_never_loses_an_extreme(values, buckets):
    kept = [values[index] for index in thin(values, buckets)]
    known = [value for value in values if value is not None]
    if known:
        left = [value for value in kept if value is not None]
        assert min(left) == min(known) and max(left) == max(known)
    assert (None in kept) == (None in values)


def test_a_hundred_thousand_values_make_a_bounded_drawing():
    html = figure(Chart("loss", [series([2 + math.sin(index) for index in range(100_000)])], smooth=True))
    assert html.count("<svg") == 4 and len(points(html)) == 8
    assert max(points(html)) <= 3 * BUCKETS + 2 and min(points(html)) > BUCKETS
    assert len(html) < 250_000


def test_values_that_are_not_finite_leave_a_gap_and_are_told():
    html = figure(Chart("loss", [series([3.0, 2.0, None, None, 2.5, 2.4])]))
    assert html.count('class="cross') == 4
    assert "2 not finite (step 3, 4)" in html
    first = re.search(r'<path class="line[^"]*" d="([^"]*)"', html).group(1)
    assert first.count("M") == 2 and first.count("L") == 2
    assert "nan" not in html.lower() and "inf" not in html.lower().replace("infin", "")


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [5e-324, 5e-324], [1e30, -1e30], [3e-4, 3e-4 + 1e-19],
                                    [1e-9, 1e9], [-1.0, 0.0, 1e-12]])
@pytest.mark.parametrize("log", [False, True])
def test_odd_ranges_are_drawn_inside_the_frame(values, log):
    html = figure(Chart("odd", [series(values)], log=log, from_zero=log))
    places = [float(number) for d in re.findall(r'<path class="line[^"]*" d="([^"]+)"', html)
              for number in re.findall(r" (-?[\d.e+-]+)", d)]
    assert places and all(0 <= place <= 240 for place in places)
    assert len(re.findall('class="gridline"', html)) >= 2


def test_no_value_at_all_says_so():
    assert "No values yet" in figure(Chart("loss", [series([])]))
    assert "No values yet" in figure(Chart("loss", [series([None, None])]))


def test_a_mean_is_the_value_at_both_ends_and_smooth_between():
    values = [float(index % 2) for index in range(1000)]
    means = smoothed(values, range(1000))
    assert means[0] == values[0] and means[-1] == values[-1]
    assert all(abs(mean - 0.5) < 0.1 for mean in means[50:-50])
    values[500] = None
    assert smoothed(values, [499, 500, 501])[1] is None


def test_levels_lie_inside_and_their_labels_do_not_overlap():
    levels = [Level("xz", 9.0), Level("3-gram", 8.99), Level("2-gram", 8.98)]
    html = figure(Chart("bits", [series([2.0, 1.0])], levels=levels))
    drawing = html.split("<svg")[1]
    heights = [float(y) for y in re.findall(r'class="label" x="[^"]+" y="([^"]+)"', drawing)]
    assert len(heights) == 3 and all(b - a >= 11.9 for a, b in zip(heights, heights[1:], strict=False))
    lines = [float(y) for y in re.findall(r'class="level" d="M[\d.]+ ([\d.]+)H', drawing)]
    assert len(lines) == 3 and min(lines) > 0


def test_the_later_part_is_not_pressed_flat_by_a_level_far_off():
    html = figure(Chart("bits", [series([9.0, *(2 - index / 100 for index in range(20))])], levels=[Level("xz", 5.0)]))
    drawings = html.split("<svg")[1:]
    assert ["xz 5.000" in drawing for drawing in drawings] == [True, False, True, False]


def test_without_tokens_only_steps_are_drawn():
    html = figure(Chart("loss", [Series("a", 0, [1, 2], None, [1.0, 2.0])]))
    assert html.count("<svg") == 2 and html.count('data-x="any"') == 2 and "tokens" not in html


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 8))
def test_ticks_are_few_and_inside(low, span, count):
    high = low + span
    if high - low < 1e-9 * abs(high):
        return
    found = ticks(low, high, count)
    slack = span * 1e-6 + abs(low) * 1e-12
    assert len(found) <= count + 1
    assert all(low - slack <= tick <= high + slack for tick in found)


@given(st.floats(1e-9, 1e6), st.floats(8, 1e12))
def test_log_ticks_are_few_and_inside(low, ratio):
    found = log_ticks(low, low * ratio)
    assert 1 <= len(found) <= 12
    assert all(low * 0.99 <= tick <= low * ratio * 1.01 for tick in found)
