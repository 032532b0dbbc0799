"""The console of a command: what data files and models write is shown on a terminal, and cannot steer it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from ctllm_jax.config.control import as_started, visible


class SafeConsole(Console):
    """A console that shows control characters as signs on a terminal; to a pipe or file text goes as it is."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; the commands in a text are those of the program that was started."""
        super().print(*map(_as_started, objects), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """The segments of a renderable; rich's own control codes are segments apart."""
        for segment in super().render(renderable, options):
            if self.is_terminal and segment.control is None and visible(segment.text) != segment.text:
                segment = Segment(visible(segment.text), segment.style)
            yield segment


def _as_started(value: Any) -> Any:
    if isinstance(value, Text) and not value.spans:
        return Text(as_started(value.plain), style=value.style)
    return as_started(value) if isinstance(value, str) else value
