"""Hours and disk of a whole corpus, from a sample of it that goes through every stage."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.prepare import PrepareConfig
from data_prep.readers import InputUnit

SAMPLE_BYTES = 4 * 2**20
"""Bytes of a file in storage."""
FILES = 3
"""Of a source, spread over its units."""
_MANY = 10**9


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimate for the whole input. `stages`: CPU-seconds by stage; `workers` divide them; sizes are in bytes."""

    sample_bytes: int
    total_bytes: int
    stages: dict[str, float]
    workers: int
    clean_bytes: float
    disk_bytes: float
    documents: float
    tokens: float

    @property
    def hours(self) -> float:
        """Wall time if every worker has its own core and serial parts take as long as their share."""
        return sum(self.stages.values()) / self.workers / 3600


def estimate(config: PrepareConfig, inputs: Sequence[InputUnit],
             progress: Callable[[str, int, int], None] = lambda stage, done, total: None) -> Estimate:
    """Run the stages on the beginnings of some files of each source, and scale by bytes in storage.

    What compares documents with each other (joins) is scaled alike, a little too low for a large corpus. Raises
    UserError if nothing of the sample can be read.
    """
    from data_prep.pipeline import prepare

    with tempfile.TemporaryDirectory(prefix="ctllm-estimate-") as folder:
        sample = [unit for source in config.all_sources() for unit in
                  _sample([unit for unit in inputs if unit["source"] == source], Path(folder))]
        output = Path(folder) / "out"
        trial = config.model_copy(update={"output": str(output), "limit": None, "max_bad": _MANY})
        ran = prepare(trial, inputs=sample, progress=progress)
        sampled, total = (sum(unit["size"] for unit in units) for units in (sample, inputs))
        if not sampled:
            raise UserError("the input holds nothing that could be timed")
        scale = total / sampled
        alone = {stage: seconds * ran.workers for stage, seconds in ran.seconds.items() if stage not in ran.cpu_seconds}
        used = sum(path.stat().st_size for path in output.rglob("*") if path.is_file() and path.stat().st_nlink == 1)
        linked = sum(path.stat().st_size / path.stat().st_nlink for path in output.rglob("*")
                     if path.is_file() and path.stat().st_nlink > 1)
        cleaned = [commit.counters for _, commit in ran.stages["clean"]]
        tokens = sum(split.total("tokens") for manifest in ran.manifests.values() for split in manifest.splits.values())
        return Estimate(
            sample_bytes=sampled, total_bytes=total, workers=ran.workers,
            stages={stage: seconds * scale for stage, seconds in (ran.cpu_seconds | alone).items()},
            clean_bytes=sum(counters["kept_bytes"] for counters in cleaned) * scale, disk_bytes=(used + linked) * scale,
            documents=sum(counters["kept"] for counters in cleaned) * scale, tokens=tokens * scale)


def _sample(units: list[InputUnit], folder: Path) -> list[InputUnit]:
    """Units over the beginnings of a few of these: cut copies, or for Parquet, which cannot be cut, a row group."""
    step = max(1, len(units) // FILES)
    return [_beginning(unit, folder) for unit in units[::step][:FILES]]


def _beginning(unit: InputUnit, folder: Path) -> InputUnit:
    from data_prep.readers.files import open_file

    if unit["kind"] == "parquet":
        groups = max(1, unit["stop"] - unit["start"]) if unit["stop"] is not None else 1
        return {**unit, "stop": None if unit["stop"] is None else unit["start"] + 1, "size": unit["size"] // groups}
    if unit["size"] <= SAMPLE_BYTES or unit["kind"] == "text":
        return unit  # A text file is one document, and bad where it is cut inside a character.
    with open_file(unit["file"]) as source:
        source.seek(unit["start"] or 0)
        data = source.read(SAMPLE_BYTES)
    path = folder / unit["id"] / Path(unit["name"]).name
    path.parent.mkdir()
    path.write_bytes(data)
    return {**unit, "file": str(path), "start": None, "stop": None, "size": len(data), "file_size": len(data)}
