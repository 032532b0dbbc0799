"""The command line itself: what can be asked, and what is said of a slip."""

import importlib
import os
import subprocess
import sys
import time

import pytest

from ctllm_jax import cli
from ctllm_jax.cli import COMMANDS
from ctllm_jax.config.types import keys_of
from tests.cli.conftest import call
from tests.runs import REPOSITORY

SCHEMAS = [(command, schema) for command in COMMANDS
           for module in [importlib.import_module(f"ctllm_jax.cli.{command.replace('-', '_')}")]
           for schema in (module.ACTIONS.values() if hasattr(module, "ACTIONS") else [module.SCHEMA]) if schema]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_lists_every_command(words):
    printed = call(*words)
    assert printed.status == 0
    assert all(f"  {command} " in printed.out and summary in printed.out for command, summary in COMMANDS.items())


@pytest.mark.parametrize(("command", "schema"), SCHEMAS)
def test_help_lists_every_key_with_its_meaning(command, schema):
    printed = call(command, "--help")
    assert printed.status == 0 and "usage: python launch.py " + command in printed.out
    text = " ".join(printed.out.split())
    for path, info in keys_of(schema):
        assert path in text and " ".join(info.description.split()) in text, path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_wins_over_whatever_else_is_there(command, option):
    assert call(command, "nonsense", "a=b", option).status == 0


def test_version():
    from ctllm_jax import __version__

    assert call("--version").out.strip() == __version__


@pytest.mark.parametrize(("words", "message"), [
    (["pretrian"], "unknown command pretrian; did you mean pretrain?"),
    (["xyz"], "unknown command xyz: there are quickstart, tokenizer,"),
    (["pretrain", "debug/pretrain", "--dry-rum"],
     "unknown option --dry-rum: there are --dry-run, --help, --print-config"),
    (["pretrain", "debug/pretrain", "--steps=3"], "unknown option --steps=3"),
    (["pretrain", "debug/pretrain", "--steps=3"], "keys are written without dashes: steps=3"),
    (["pretrain"], "pretrain needs a config, such as configs/quickstart/pretrain.yaml"),
    (["pretrain", "debug/pretrain", "steps", "3"], "pretrain takes one config; steps 3 is left over"),
    (["pretrain", "debug/pretrian"], "no config debug/pretrian: no such file"),
    (["pretrain", "debug/pretrian"], "did you mean debug/pretrain"),
    (["data"], "data needs an action; there are inspect, verify"),
    (["data", "verfy"], "data needs an action; verfy is none: there are inspect, verify"),
    (["checkpoint", "rm"], "checkpoint needs an action; rm is none: there are ls"),
    (["checkpoint", "ls"], "checkpoint ls needs a run directory"),
    (["generate", "promt=x"], "promt=x (command line): unknown key; did you mean prompt?"),
    (["generate"], "generate needs one MODEL"), (["generate", "a", "b"], "generate needs one MODEL"),
    (["generate", "nowhere"], "no model nowhere: nowhere is no directory"),
    (["report"], "report needs a run directory"), (["report", "nowhere"], "nowhere: no such directory"),
    (["pretrain", "debug/pretrain", "optimizer.clip_norm=0"], "optimizer.clip_norm=0.0 (command line): must be > 0.0"),
    (["quickstart", "debug/pretrain"], "quickstart makes its own data: data.sources must be zh, en and code")])
def test_a_slip_is_status_2_and_says_what_there_is(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = call(*words)
    assert printed.status == 2 and printed.out == ""
    assert message in printed.err and printed.err.startswith("error: ") and "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []


PROBE = """
import sys
import time
from ctllm_jax.cli import main
statuses = [main(words.split()) for words in sys.argv[1:]]
heavy = {'jax', 'flax', 'orbax', 'grain', 'tensorflow_datasets'} & {name.partition('.')[0] for name in sys.modules}
print('PROBE', statuses, sorted(heavy))
"""


def probe(*commands):
    """The statuses of commands in a fresh process, the heavy modules that it imported, and its errors."""
    done = subprocess.run([sys.executable, "-c", PROBE, *commands], capture_output=True, text=True, timeout=120,
                          cwd=REPOSITORY, check=True)
    return done.stdout.strip().splitlines()[-1], done.stderr


def test_three_errors_at_once_before_jax_is_imported():
    line, errors = probe("pretrain configs/quickstart/pretrain.yaml optimizer.lrr=1 optimizer.lr=fast steps=-1")
    assert line == "PROBE [2] []"
    assert "3 problems in the config" in errors
    assert "optimizer.lrr=1 (command line): unknown key; did you mean optimizer.lr?" in errors
    assert "optimizer.lr=fast (command line): needs float" in errors
    assert "steps=-1 (command line): must be >= 1" in errors


def test_nothing_heavy_is_imported_to_answer_a_question():
    """Help of every command, a printed config, a slip in each place."""
    commands = [f"{command} --help" for command in COMMANDS]
    line, _ = probe("--help", *commands, "pretrain debug/pretrain --print-config", "pretrain debug/pretrain stepps=1",
                    "generate temprature=1", "pretrain nowhere")
    assert line == f"PROBE {[0] * (len(commands) + 2) + [2] * 3} []"


def test_a_terminal_without_chinese_is_shown_escapes():
    done = subprocess.run([sys.executable, "launch.py", "generate", "--help"], capture_output=True, timeout=120,
                          cwd=REPOSITORY, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"\\u4eca\\u5929" in done.stdout and b"Traceback" not in done.stderr


def test_the_environment_stays_as_it_was(monkeypatch):
    """A command may set defaults for what it imports, and leaves what the user has set."""
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    call("pretrain", "debug/pretrain", "--print-config")
    import os

    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"


LOGGING = """
import logging, sys
from ctllm_jax import cli

cli.importlib.import_module = lambda name: None
def run(*arguments):
    for name in ("ctllm_jax.training.supervision.lock", "absl"):
        logging.getLogger(name).warning("%d steps", 3)
    return 0
cli._run = run
sys.exit(cli.main(["data"]))
"""


def test_a_warning_is_a_line_for_a_person():
    done = subprocess.run([sys.executable, "-c", LOGGING], check=False, capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stderr) == (0, "warning: 3 steps\nwarning (absl): 3 steps\n")


def test_a_command_within_another_one_begins_when_it_is_called():
    """Otherwise the seconds of the stages before it would count as its start."""
    now = time.perf_counter()
    assert cli.Context("sft", None).began >= now
    assert cli._context("sft", None, [], [], [], None).began < now


@pytest.mark.parametrize(("program", "shown"), [
    ("/usr/bin/ctllm", "ctllm"), ("/site/ctllm_jax/__main__.py", "python -m ctllm_jax"),
    ("launch.py", "python launch.py"),
])
def test_commands_in_messages_are_those_of_the_program_that_was_started(program, shown, monkeypatch, capsys):
    from ctllm_jax.config.control import as_started
    from ctllm_jax.report.terminal import SafeConsole

    monkeypatch.setattr(sys, "argv", [program])
    assert as_started("next: python launch.py chat runs/a; launch.py sft, runs/launch.py x") == (
        f"next: {shown} chat runs/a; {shown if program != 'launch.py' else 'launch.py'} sft, runs/launch.py x")
    SafeConsole().print("next: python launch.py chat runs/a")
    assert cli.main(["--help"]) == 0 and cli.main(["nothing"]) == 2
    printed = capsys.readouterr()
    assert f"next: {shown} chat runs/a" in printed.out and f"start here: {shown} quickstart" in printed.out
    assert cli.main(["sft", "--help"]) == 0
    assert f"usage: {shown} sft CONFIG" in capsys.readouterr().out
