"""Stages of a command that goes on where it was stopped: what has left its result on disk is passed over."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Stages:
    """Runs what is not there yet, and remembers how long it took."""

    def __init__(self, directory: Path, console: Any):
        self.directory, self.console = directory, console
        self.seconds: dict[str, float] = {}

    def run(self, name: str, result: Path, make: Callable[[Path], None], *,
            stale: Callable[[Path], bool] = lambda path: False, directory: Path | None = None) -> Path:
        """`make(result)`, unless the result is there; a result appears when it is whole. `directory` as for `done`."""
        if result.exists() and not stale(result):
            self.console.print(f"[dim]{name}: there already ({result})[/]")
            return result
        self.console.print(f"[bold]{name}[/] …")
        began = time.monotonic()
        result.parent.mkdir(parents=True, exist_ok=True)
        make(result)
        self.done(name, time.monotonic() - began, directory=directory)
        return result

    def done(self, name: str, seconds: float, *, directory: Path | None = None) -> None:
        """Note a stage in the metrics of its run: that in `directory`, or the first one."""
        from ctllm_jax.training.metrics import MetricsWriter

        self.seconds[name] = seconds
        self.console.print(f"[dim]{name}: {seconds:.1f} s[/]")
        with MetricsWriter(directory or self.directory, process_index=0) as writer:
            writer.event("stage", name=name, seconds=seconds)

    def write_baselines(self, baselines: dict[str, dict[str, float]]) -> None:
        """Note the baselines in the run's metrics."""
        from ctllm_jax.training.metrics import MetricsWriter

        with MetricsWriter(self.directory, process_index=0) as writer:
            for name, sources in baselines.items():
                writer.event("baseline", name=name,
                             sources={source: {"bits_per_byte": bits} for source, bits in sources.items()})


def write_json(path: Path, values: Any) -> None:
    """A file that is there whole or not at all."""
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(values, indent=1))
    partial.rename(path)
