"""`launch.py report RUN [RUN2 ...]`: one HTML page of a run, or of several side by side."""

from __future__ import annotations

from ctllm_jax.config.base import Section, key


class ReportConfig(Section):
    """The report."""

    output: str = key("", "file to write. Empty: report.html in the run directory, of several runs in the current one", output="file")
