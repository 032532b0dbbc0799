"""What a command shows while it takes its time."""

import io
import time

from rich.console import Console

from ctllm_jax.cli import progress


def test_a_log_gets_lines_by_the_clock(monkeypatch):
    """Before the first is counted too; and none once it has ended."""
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.1)
    out = io.StringIO()
    with progress.count_bar(Console(file=out), "pairs", total=40, done=10) as advance:
        time.sleep(0.25)
        for _ in range(20):
            advance()
        time.sleep(0.25)
    lines = out.getvalue().splitlines()
    assert lines[0] == "pairs 10 of 40 | eta –" and lines[-1].startswith("pairs 30 of 40 | ")
    assert "/s | eta " in lines[-1]
    time.sleep(0.25)
    assert out.getvalue().splitlines() == lines


def test_a_terminal_gets_a_bar(monkeypatch):
    out = io.StringIO()
    with progress.count_bar(Console(file=out, force_terminal=True, width=100), "pairs", total=3) as advance:
        for _ in range(3):
            advance()
    assert "3/3" in out.getvalue() and "/s | eta 0.0s" in out.getvalue()


def test_a_stage_is_shown_in_percent():
    """Some stages count units, and not bytes."""
    out = io.StringIO()
    with progress.stage_bars(Console(file=out, force_terminal=True, width=100)) as report:
        report("clusters", 3, 4)
    assert "clusters" in out.getvalue() and "75%" in out.getvalue() and "bytes" not in out.getvalue()
