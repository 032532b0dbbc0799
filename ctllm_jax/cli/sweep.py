"""`launch.py sweep STAGE CONFIG … [vary.KEY=V1,V2 …]`: runs in turn, each a process of its own, compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctllm_jax.cli.outputs import check_writable
from ctllm_jax.cli.processes import shell_status, start_child
from ctllm_jax.cluster import distributed
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.stages import STAGES
from ctllm_jax.config.statuses import DONE, FAILED, INTERRUPTED, REQUEUE
from ctllm_jax.config.sweep import Sweep, SweepRun, plan_sweep, run_key, to_yaml
from ctllm_jax.report.run import read_run

if TYPE_CHECKING:
    from ctllm_jax.cli import Context

__all__ = ["ACTIONS", "OPTIONS", "USAGE", "configure", "run", "to_yaml"]

ACTIONS = dict.fromkeys(STAGES)
OPTIONS = ("--fail-fast",)
USAGE = r"""
usage: python launch.py sweep pretrain|sft|dpo CONFIG [CONFIG …] [key=value …] [vary.KEY=V1,V2 …]
                              [--dry-run | --print-config | --fail-fast]

One run for each CONFIG and each choice of the varied keys, in turn, each below run.dir in a folder named by what
varies. Keys are those of the stage, with or without `vary.`; values stand between commas (\, is a comma of a value):
  python launch.py sweep sft configs/ct_llm_2b/sft_*_1.yaml configs/ct_llm_2b/sft_*_only.yaml run.dir=runs/ratios
  python launch.py sweep sft configs/quickstart/sft.yaml data=dialogues.jsonl vary.optimizer.lr=1e-4,3e-4 vary.seed=1,2

All configs are checked before the first run starts. The same command passes over what is finished and goes on with what
is not. A run that fails does not stop the others, unless --fail-fast; the exit status is 1 then. Ctrl-C ends all. At
the end: a table, and one page of all runs (report.html).
"""
STATE = "sweep.json"
ENDED_EARLY = {"interrupted": INTERRUPTED, "preempted": REQUEUE, "stopped": DONE}
"""How a run ends before its last step, and the sweep's exit status then."""
_SIGNALS = {signal.SIGINT: signal.SIGINT, signal.SIGHUP: signal.SIGINT, signal.SIGTERM: signal.SIGTERM,
            signal.SIGUSR1: signal.SIGUSR1}
"""What is received, and what the run is sent."""


def configure(action: str, words: Sequence[str], overrides: Sequence[str]) -> Sweep:
    """The runs, checked; called before `run`."""
    return plan_sweep(action, words, overrides)


def run(context: Context) -> int:
    """All runs, then the comparison; the exit status: 0 all done, 1 some failed, else that of a run ended early."""
    from rich.text import Text

    from ctllm_jax.report.readable import duration

    sweep, console = context.config, context.console
    if (sweep.directory / "checkpoints").exists():
        raise UserError(f"run.dir={sweep.directory} is a run; a sweep needs a directory for its runs")
    state = State(sweep)
    if context.dry_run:
        return dry_run(sweep, state, console)
    check_writable(sweep.directory, f"run.dir={sweep.directory}")
    outcomes: dict[str, str] = {}
    state.write(command=context.command_line)
    console.print(Text(f"sweep of {len(sweep.runs)} runs under {sweep.directory}; the same command goes on",
                       style="bold"))
    with Signals() as signals:
        for number, each in enumerate(sweep.runs, 1):
            head = f"run {number} of {len(sweep.runs)}: {each.name}"
            if state.is_finished(each):
                console.print(Text(f"{head} is finished, and passed over", style="dim"))
                outcomes[each.name] = "done"
                continue
            console.rule(Text(head), align="left")
            began = time.monotonic()
            status = start(sweep.stage, each, signals)
            outcomes[each.name] = describe_status(status, each)
            if outcomes[each.name] == "done":
                state.finish(each)
            style = {"done": "green", "failed": "bold red"}.get(outcomes[each.name].partition(" ")[0], "yellow")
            took = duration(time.monotonic() - began)
            console.print(Text(f"{head}: {outcomes[each.name]} after {took}", style=style))
            if outcomes[each.name] in ENDED_EARLY or signals.received or status and "--fail-fast" in context.options:
                break
    early = next((status for state, status in ENDED_EARLY.items() if state in outcomes.values()), None)
    compare(sweep, outcomes, console)
    if early is not None or signals.received:
        console.print("interrupted; the same command goes on")
        return INTERRUPTED if early is None else early
    return DONE if all(outcomes.get(each.name) == "done" for each in sweep.runs) else FAILED


def start(stage: str, each: SweepRun, signals: Signals) -> int:
    """One run in a process of its own, to its end; its exit status as a shell gives it."""
    process = start_child([stage, *each.words])
    signals.process = process
    if signals.received:  # in the moment before there was a process
        process.send_signal(signals.received[0])
    try:
        status = process.wait()
    finally:
        signals.process = None
    return shell_status(status)


class Signals:
    """Ctrl-C, and being told to end, are for the run: it stops behind its step and keeps it; twice, at once.

    The run is a process group of its own, so that a terminal's Ctrl-C reaches it once, from here.
    """

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.received: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            # What is ignored stays so, here and in the run: nohup ignores SIGHUP, a script's & ignores SIGINT.
            self._before = {number: signal.signal(number, self._forward) for number in _SIGNALS
                            if signal.getsignal(number) is not signal.SIG_IGN}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _forward(self, number: int, frame: Any) -> None:
        self.received.append(_SIGNALS[signal.Signals(number)])
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(self.received[-1])


def describe_status(status: int, each: SweepRun) -> str:
    """How a run ended, in words: done, one of ENDED_EARLY, or failed and why."""
    if status == DONE:
        return read_run(each.config.run.dir).state
    for state, early in ENDED_EARLY.items():
        if status == early:
            return state
    if status > 128:
        try:
            return f"failed (killed by {signal.Signals(status - 128).name})"
        except ValueError:
            pass
    return f"failed (exit status {status})"


class State:
    """sweep.json: the runs of a sweep for `report`, and which of them are finished, by their `run_key`."""

    def __init__(self, sweep: Sweep):
        self.path, self._sweep = sweep.directory / STATE, sweep
        self._finished: dict[str, str] = read_state(sweep.directory).get("finished", {}) if self.path.exists() else {}
        self._keys = {each.name: run_key(each.config) for each in sweep.runs}
        self._command = ""

    def is_finished(self, each: SweepRun) -> bool:
        """Whether a run ended as it would end now. What may have changed is left to the run itself to judge."""
        return self._finished.get(each.name) == self._keys[each.name] and Path(each.config.run.dir).is_dir()

    def finish(self, each: SweepRun) -> None:
        """Note that a run is finished."""
        self._finished[each.name] = self._keys[each.name]
        self.write()

    def write(self, *, command: str | None = None) -> None:
        """Write the file, at once or not at all; of several processes the first does."""
        self._command = command if command is not None else self._command
        if distributed.detect(os.environ).index:
            return
        from ctllm_jax.report.page import save

        runs = [{"name": each.name, "config": each.target, "varied": each.varied} for each in self._sweep.runs]
        save(json.dumps({"stage": self._sweep.stage, "command": self._command, "runs": runs,
                         "finished": self._finished}, indent=1, ensure_ascii=False) + "\n", self.path)


def read_state(directory: Path) -> dict[str, Any]:
    """What sweep.json of a directory says. UserError where it is damaged."""
    path = directory / STATE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["runs"], list) or not isinstance(found["finished"], dict):
            raise ValueError("not of a sweep")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it: each run knows how far it is") from None


def run_directories(directory: Path) -> list[Path]:
    """The run directories of a sweep that there are already, in its order."""
    found = (directory / str(each["name"]) for each in read_state(directory)["runs"])
    return [path for path in found if (path / "metrics.jsonl").exists()]


def compare(sweep: Sweep, outcomes: dict[str, str], console: Any) -> None:
    """The table on the terminal, and the page; of several processes the first makes them."""
    from rich.text import Text

    from ctllm_jax.evaluation.curves import benchmark_charts
    from ctllm_jax.report.page import write_report

    if distributed.detect(os.environ).index:
        return
    found = {each.name: read_run(each.config.run.dir) for each in sweep.runs
             if (Path(each.config.run.dir) / "metrics.jsonl").exists()}
    if not found:
        return
    from ctllm_jax.cli.comparison import print_comparison

    states = {each.name: outcomes.get(each.name, "not started") for each in sweep.runs}
    print_comparison(found, states, console)
    directories = [each.directory for each in found.values()]
    page = write_report(directories, sweep.directory / "report.html", benchmarks=benchmark_charts(directories))
    console.print(Text(f"report: {page}"))


def dry_run(sweep: Sweep, state: State, console: Any) -> int:
    """What every run would come to; the data is opened, nothing is started."""
    from rich.text import Text

    from ctllm_jax.cli.comparison import Plan, print_plans

    plans, problems = [], []
    for each in sweep.runs:
        directory = Path(each.config.run.dir)
        if state.is_finished(each):
            now = "finished"
        else:
            now = "goes on" if any((directory / "checkpoints").glob("[0-9]*")) else "starts"
        try:
            config, data, *_ = STAGES[sweep.stage].open(each.config)
        except UserError as error:
            problems.append(f"{each.name}: {error}")
            continue
        plans.append(Plan(each.name, now, config, data.tokens_per_source(config.steps), data.epochs(config.steps),
                          getattr(data, "report", None)))
    if plans:
        console.print(Text(f"plan of {sweep.directory} (nothing was started)", style="bold"))
        print_plans(plans, console)
    if problems:
        raise UserError("\n  ".join(["the data of these runs cannot be opened:", *problems]))
    return 0
