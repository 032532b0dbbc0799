"""How far a command is that takes its time: a bar on a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ctllm_jax.report.readable import compact, duration

_LINE_SECONDS = 30.0  # between the lines of a log


@contextlib.contextmanager
def stage_bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A function (stage, bytes done, bytes in all) that moves the bar of its stage. Nothing is drawn in a pipe."""
    columns = (TextColumn("{task.description:>10}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
               TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        tasks = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield report


@contextlib.contextmanager
def count_bar(console: Console, noun: str, *, total: int, done: int = 0) -> Iterator[Callable[[], None]]:
    """A function that counts one more, of `total` of which `done` were there before.

    A terminal shows a bar with rate and time left; elsewhere a line says as much every 30 seconds.
    """
    began = told = time.monotonic()
    count = done
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(noun, total=total, completed=done, pace="")

        def advance() -> None:
            nonlocal count, told
            count += 1
            now = time.monotonic()
            rate = (count - done) / max(now - began, 1e-9)
            pace = f"{compact(rate)}/s | eta {duration((total - count) / rate)}"
            progress.update(task, completed=count, pace=pace)
            if not console.is_terminal and now - told >= _LINE_SECONDS:
                told = now
                console.print(f"{noun} {count:,} of {total:,} | {pace}")

        yield advance
