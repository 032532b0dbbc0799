"""What a model or a data file writes cannot steer the terminal that shows it."""

import io

import pytest
from rich.live import Live
from rich.table import Table

from ctllm_jax.report.terminal import SafeConsole

HOSTILE = "title\x1b]0;x\x07 clear\x1b[2J c1\x9b2J back\x08 right\u202eleft"


def show(console):
    table = Table("name")
    table.add_row(HOSTILE)
    console.print(table)
    console.print(f"[bold]{HOSTILE}[/]", highlight=False)
    console.out(HOSTILE, highlight=False)
    console.rule(HOSTILE)


def test_a_terminal_sees_signs_and_richs_own_codes_alone():
    file = io.StringIO()
    console = SafeConsole(file=file, force_terminal=True, color_system="standard", width=100)
    show(console)
    with Live(HOSTILE, console=console):
        pass
    written = file.getvalue()
    assert written.count("title␛") == 6 and "\u202e" not in written and "\x9b" not in written
    assert "\x1b]" not in written and "\x1b[1m" in written
    assert "\x1b[2K" in written or "\x1b[?25l" in written, "rich still moves the cursor of its own live line"
    assert "\x1b[2J" not in written


def test_a_pipe_gets_the_text_as_it_is():
    file = io.StringIO()
    SafeConsole(file=file, force_terminal=False, width=200).out("a\x1b[2J\u202e中\n", end="")
    assert file.getvalue() == "a\x1b[2J\u202e中\n"


@pytest.mark.parametrize("words", [["pretrain", "debug/pre\x1b[2Jtrain"], ["generate", "no\x1b]0;x\x07where"],
                                   ["data", "verify", "no\x1b[2J"], ["report", "\x1b[2J"]])
def test_errors_show_names_without_their_escapes(words, tmp_path, monkeypatch):
    from tests.cli.conftest import call

    monkeypatch.chdir(tmp_path)
    printed = call(*words)
    assert printed.status in (1, 2) and "\x1b" not in printed.err
    assert "␛" in printed.err + printed.out.replace("\x1b", "␛")
