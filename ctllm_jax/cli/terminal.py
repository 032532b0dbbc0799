"""The console of a command: text of data files and models is shown without control characters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

from ctllm_jax.config.control import visible


class SafeConsole(Console):
    """A console that shows control characters as signs on a terminal; to a pipe or file text goes as it is."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """The segments of a renderable; rich's own control codes are segments apart."""
        for segment in super().render(renderable, options):
            if self.is_terminal and segment.control is None and visible(segment.text) != segment.text:
                segment = Segment(visible(segment.text), segment.style)
            yield segment
