"""Benchmarks on the page: curves over tokens on both scales, and what the pointer reads off them."""

import re

import pytest

from ctllm_jax.report.charts import LEFT, RIGHT, Chart, Level, Series, figure
from ctllm_jax.report.page import write_report
from tests.browser import CHROMIUM, Browser

OURS = Series("5 examples", 0, [10, 20, 30], [1e6, 1e7, 1e8], [0.24, 0.27, 0.3], dots=True, low=[0.2, 0.22, None],
              high=[0.29, 0.33, None])
PAPER = Series("CT-LLM, paper", 7, range(2), [1e10, 1e12], [0.26, 0.37], dots=True, dashed=True)
CHART = Chart("CMMLU", [OURS, PAPER], levels=[Level("guessing", 0.25)], kind="percent", both_scales=True)


def drawing(html, scale):
    return re.search(rf'<svg[^>]*data-scale="{scale}"[^>]*>.*?</svg>', html, re.S)[0]


def dots(svg, color):
    found = re.findall(rf'<circle class="{color}[^"]*" cx="([^"]*)" cy="([^"]*)"', svg)
    return [(float(x), float(y)) for x, y in found]


def test_a_chart_on_both_scales_is_over_tokens_alone():
    html = figure(CHART)
    assert len(re.findall("<svg", html)) == 2 and 'data-x="steps"' not in html
    log, linear = drawing(html, "log"), drawing(html, "linear")
    # On the logarithmic scale decades are as far from each other; on the other all of ours are at the left end.
    ours = [x for x, _ in dots(log, "c0")]
    assert ours[1] - ours[0] == pytest.approx(ours[2] - ours[1], abs=0.2)
    assert ours[0] == LEFT and dots(log, "c7")[-1][0] == CHART.width - RIGHT
    assert max(x for x, _ in dots(linear, "c0")) < LEFT + 1
    assert log.count('class="level') == linear.count('class="level') == 1
    assert '<path class="line c7 dashed"' in log and '<path class="line c0"' in log
    assert 'data-domain="1000000 1e+12' in log and re.search(r'data-domain="[^"]* 0 1"', log)
    assert re.search(r'data-domain="[^"]* 0"', linear) and not re.search(r'data-domain="[^"]* 0 1"', linear)


def test_intervals_stand_around_their_values_and_inside_the_plot():
    log = drawing(figure(CHART), "log")
    spans = re.findall(r"M([\d.]+) ([\d.]+)V([\d.]+)", re.search(r'<path class="span c0" d="([^"]*)"', log)[1])
    assert len(spans) == 2  # the third value has none
    for (x, low, high), (at, value) in zip(spans, dots(log, "c0"), strict=False):
        assert float(x) == at and float(high) < value < float(low)
        assert 0 < float(high) and float(low) < CHART.height


def test_an_axis_between_two_powers_of_ten_has_its_numbers():
    close = Series("close", 0, [1, 2], [213e3, 433e3], [0.24, 0.25], dots=True)
    log = drawing(figure(Chart("CMMLU", [close], both_scales=True)), "log")
    assert len(re.findall(r'<text class="tick"[^>]*>[^<%]*k', log)) >= 2


def test_one_checkpoint_is_a_dot():
    one = Series("one", 0, [1], [1e6], [0.24], dots=True, low=[0.2], high=[0.3])
    for scale in ("log", "linear"):
        (x, y), = dots(drawing(figure(Chart("CMMLU", [one], both_scales=True)), scale), "c0")
        assert LEFT < x < CHART.width and 0 < y < CHART.height


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_the_page_in_a_browser(writer, tmp_path):
    run = writer(steps=100)
    run.start()
    page = write_report([run.directory], tmp_path / "page.html", benchmarks=[CHART])
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"file://{page}")
        browser.wait("document.readyState === 'complete' && !!document.querySelector('#benchmarks figure')")
        shown = "[...document.querySelectorAll('#benchmarks svg')].filter(e => e.getClientRects().length)"
        assert browser.run(f"{shown}.map(e => e.dataset.scale).join()") == "log"
        # The pointer in the middle of the logarithmic axis is at 1e9 tokens: behind ours, before the paper's.
        point = """(() => { const svg = %s[0], box = svg.getBoundingClientRect(), scale = box.width / 560;
            svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + (46 + %s * 504) * scale,
              clientY: box.top + 50, bubbles: true}));
            return [document.querySelector('#benchmarks .at').textContent,
              ...[...document.querySelectorAll('#benchmarks output')].map(e => e.textContent)].join('|'); })()"""
        assert browser.run(point % (shown, 0.5)) == "1B tokens|–|–"
        assert browser.run(point % (shown, 1 / 6)) == "10M tokens|27.0%|–"
        assert browser.run(point % (shown, 1.0)) == "1T tokens|–|37.0%"
        browser.run("document.querySelector('button[data-set=scale][data-to=linear]').click()")
        assert browser.run(f"{shown}.map(e => e.dataset.scale).join()") == "linear"
        assert browser.run(point % (shown, 0.5)) == "500B tokens|–|26.0%"
        assert not [each for each in browser.messages if each["method"] == "Runtime.exceptionThrown"]
