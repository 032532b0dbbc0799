"""`launch.py tables`: the runs to show next to the paper's figures, and the format."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ctllm_jax.config.base import Section, key

FORMATS = {".md": "markdown", ".csv": "csv", ".txt": "text"}


class TablesConfig(Section):
    """The paper's tables."""

    output: str | None = key(None, "file to write: .md, .csv or .txt; null: printed", output="file")
    format: Literal["text", "markdown", "csv"] | None = key(None, "how the tables are written; null: as output's ending says, else as text")
    suite: str = key("eval/paper", "suite whose benchmarks are the rows, and whose examples a figure is measured against")
    rows: Literal["all", "measured"] = key("all", "measured: leave out benchmarks of the paper that no run was asked")
    peers: bool = key(False, "also the models that the paper compares CT-LLM with")

    @model_validator(mode="after")
    def _check(self):
        if self.output is not None and self.format is None and not self.output.endswith(tuple(FORMATS)):
            raise ValueError(f"output={self.output} must end in {', '.join(FORMATS)}, or format must be given")
        return self

    @property
    def written_as(self) -> str:
        """The format, or that of output's ending."""
        endings = [kind for ending, kind in FORMATS.items() if self.output and self.output.endswith(ending)]
        return self.format or (endings[0] if endings else "text")
