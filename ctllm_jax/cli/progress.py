"""The progress of a long command: a bar on a terminal."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ctllm_jax.report.readable import compact, duration

_LINE_SECONDS = 30.0  # between the lines of a log


@contextlib.contextmanager
def stage_bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A function (stage, done, in all) that moves the bar of its stage: of bytes, units or bands, and so in percent.
    Nothing is drawn in a pipe."""
    columns = (TextColumn("{task.description:>10}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
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
    began = time.monotonic()
    count = done

    def pace() -> str:
        rate = (count - done) / max(time.monotonic() - began, 1e-9)
        return f"{compact(rate)}/s | eta {duration((total - count) / rate)}" if rate else "eta –"

    # By time and not by count, because batches are counted in bursts.
    def tell_lines() -> None:
        while not ended.wait(_LINE_SECONDS):
            console.print(f"{noun} {count:,} of {total:,} | {pace()}")

    ended = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(noun, total=total, completed=done, pace="")
        if not console.is_terminal:
            threading.Thread(target=tell_lines, daemon=True).start()

        def advance() -> None:
            nonlocal count
            count += 1
            progress.update(task, completed=count, pace=pace())

        try:
            yield advance
        finally:
            ended.set()
