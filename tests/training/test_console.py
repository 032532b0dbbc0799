"""What a run prints: plain lines without control characters, and one live line that always fits."""

import io
import math
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from ctllm_jax.training.console import TrainingConsole, _LiveLine, print_rows, training_line

RECORD = {"event": "train", "time": 1.0, "step": 120, "tokens": 1, "loss": 4.5321, "bits_per_byte": 2.31, "lr": 3e-4,
          "grad_norm": 1.234, "tokens_per_second": 12_345.6, "mfu_causal": 0.412, "mfu_full": 0.45,
          "step_seconds": 0.1, "data_wait": 0.003, "eta_seconds": 192.4}
EVALUATION = {"step": 120, "sources": {"zh": {"loss": 4.1, "bits_per_byte": 2.2, "tokens": 1, "bytes": 3},
                                       "en": {"loss": None}}}
SAMPLE = {"step": 120, "prompt": "今天", "text": "今天天气\n很好[bold]\x1b[31m\x07\x9b\u202e" + "长" * 500}


def plain(width=80):
    return Console(file=io.StringIO(), width=width)


def terminal(width=80):
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard", legacy_windows=False,
                   _environ={"TERM": "xterm"})


def show(console, total_steps=2000):
    with TrainingConsole(console, total_steps=total_steps) as shown:
        shown.train(RECORD)
        shown.evaluation(EVALUATION)
        shown.sample(SAMPLE)
        shown.message("saved [red]\x1b[2J")
    return console.file.getvalue()


def test_plain_output_is_one_line_a_record_without_control_characters():
    text = show(plain())
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    train, evaluation, sample, message = text.splitlines()
    assert train == ("step 0120/2000 | loss 4.532 | bpb 2.310 | lr 3.0e-04 | gnorm 1.23 | 12.3k tok/s | "
                     "mfu 41.2% causal | data 0.3% | eta 3m12s")
    assert evaluation == "step 0120 | held out | zh: loss 4.100, bpb 2.200 | en: loss nan"
    assert sample.startswith("step 0120 | sample | 今天天气↵很好[bold]␛[31m␇") and sample.endswith("长…")
    assert message == "saved [red]␛[2J"


def test_absent_keys_and_numbers_that_are_none():
    assert training_line({"step": 3, "loss": math.nan}, 10) == "step 03/10 | loss nan"
    assert training_line({"step": 3, "loss": math.inf, "grad_norm": None, "lr": None}, 10) == (
        "step 03/10 | loss inf | lr – | gnorm nan")
    assert training_line({"step": 3}, 10) == "step 03/10"


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 132, 200])
@pytest.mark.parametrize("record", [None, RECORD, {"step": 1_999_999, "loss": None, "tokens_per_second": 1.2e6,
                                                   "eta_seconds": 3e6, "data_wait": 1.0, "bits_per_byte": 2.0}])
def test_the_live_line_fits_any_width(width, record):
    line = _LiveLine(2_000_000)
    line.record = record
    text = line.fitted(width).plain
    assert cell_len(text) <= width and "\n" not in text


def test_a_narrow_line_gives_up_the_least_first():
    line = _LiveLine(2000)
    line.record = RECORD
    wide, usual, narrow = (line.fitted(width).plain for width in (150, 79, 45))
    for part in ("120/2,000", "loss 4.532", "bpb 2.310", "lr 3.0e-04", "gnorm", "12.3k tok/s", "mfu 41.2% causal",
                 "data", "eta"):
        assert part in wide
    for part in ("loss 4.532", "bpb 2.310", "12.3k tok/s", "data 0.3%", "eta 3m12s"):
        assert part in usual
    assert "gnorm" not in usual
    assert "loss 4.532" in narrow and "eta 3m12s" in narrow and "━" in narrow


def test_the_bar_is_full_at_the_end_alone():
    line = _LiveLine(2000)
    for step, full in ((0, 0), (1999, 23), (2000, 24)):
        line.record = {**RECORD, "step": step}
        text = line.fitted(200)
        green = sum(span.end - span.start for span in text.spans if span.style == "green")
        assert green == full and text.plain.count("━") == 24


def test_a_terminal_shows_records_above_the_line_and_keeps_the_last():
    text = show(terminal())
    assert "\x1b[31m\x07" not in text and "\x1b[2J" not in text and "\u202e" not in text
    visible = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert visible.index("held out") < visible.index("今天") < visible.rindex("step 0120/2000")
    assert "\x1b[?25h" in text, "the cursor is shown again"


def test_a_failure_inside_leaves_the_cursor_shown():
    console = terminal()
    with pytest.raises(KeyboardInterrupt), TrainingConsole(console, total_steps=10) as shown:
        shown.train({"step": 1, "loss": 1.0})
        raise KeyboardInterrupt
    assert console.file.getvalue().rindex("\x1b[?25h") > console.file.getvalue().rindex("\x1b[?25l")


def test_other_processes_show_nothing(capsys):
    with TrainingConsole(None, total_steps=10) as shown:
        shown.train(RECORD)
        shown.evaluation(EVALUATION)
        shown.sample(SAMPLE)
        shown.message("x")
    assert capsys.readouterr() == ("", "")


def test_the_banner_lines_up_wide_characters_and_wraps_only_on_a_terminal():
    rows = [("devices", "8 x H100"), ("来源", "中" * 60 + "[bold]"), ("运行", "x")]
    console = plain()
    print_rows(console, rows, title="pretrain [x]")
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "pretrain [x]" and len(lines) == 4
    assert {cell_len(line[:line.index(value[0], 4)]) for line, (_, value) in zip(lines[1:], rows, strict=True)} == {11}
    assert lines[2].endswith("中[bold]")
    console = terminal(60)
    print_rows(console, rows)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue()).splitlines()
    assert all(cell_len(line) <= 60 for line in shown) and sum(line.count("中") for line in shown) == 60
    print_rows(empty := plain(), [])
    assert empty.file.getvalue() == ""
