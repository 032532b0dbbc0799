"""Shared parts of the stages: their options, and reading and writing of Parquet parts."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.folders import files_below
from ctllm_jax.config.prepare import PrepareConfig
from data_prep.commits import Commit, Output, Stage, Unit

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN_CHARACTERS = 600
"""Of a sample document in the report."""


def options_of(config: PrepareConfig, stage: Stage, **more: Any) -> dict[str, Any]:
    """The options of a worker, as JSON values."""
    return {"config": config.model_dump_json(), "stage": {"root": str(stage.root), "options": stage.options,
                                                          "parts": str(stage.parts)}, **more}


def stage_of(options: dict[str, Any]) -> Stage:
    """The stage that `options_of` was given."""
    values = options["stage"]
    return Stage(Path(values["root"]), values["options"], Path(values["parts"]))


@functools.lru_cache(maxsize=4)
def _parsed(text: str) -> PrepareConfig:
    return PrepareConfig.model_validate_json(text)


def config_of(options: dict[str, Any]) -> PrepareConfig:
    """The config that `options_of` was given."""
    return _parsed(options["config"])


def run_unit(unit: Unit, options: dict[str, Any], work: Callable[[Unit, dict, Output], None]) -> dict[str, Any]:
    """Run `work(unit, options, output)` and commit its files, unless another worker has; returns the counters."""
    stage = stage_of(options)
    if found := stage.find(unit):
        return found.counters
    began = time.process_time()
    with stage.commit(unit) as output:
        work(unit, options, output)
        output.counters["cpu_seconds"] = round(time.process_time() - began, 3)
    return output.counters


def write_part(path: Path, columns: dict[str, Any], schema: pa.Schema) -> None:
    """Columns to a Parquet file; the same columns give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns, schema=schema), path, compression="zstd", compression_level=1)


def read_part(path: str | Path, columns: Sequence[str], *, without: Sequence[int] = ()) -> dict[str, list]:
    """Columns of a part as Python lists, without the rows of these indices."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=list(columns))
    if len(without):
        keep = np.ones(table.num_rows, bool)
        keep[np.asarray(without)] = False
        table = table.filter(pa.array(keep))
    return {name: table[name].to_pylist() for name in columns}


def packages() -> None:
    """Raise UserError if a package of the pipeline is not installed, before work begins."""
    import importlib.util

    for name in ("daft", "pyarrow", "scipy", "zstandard"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"prepare needs the package {name}: pip install 'ctllm-jax[prep]'")


def content_hash(path: str | None) -> str | None:
    """Hash of a file, or of a folder's files, that decides bytes of the output; None for no path."""
    if path is None:
        return None
    root = Path(path)
    digest = hashlib.sha256()
    for file in files_below(root) if root.is_dir() else [root]:
        digest.update(f"{file.relative_to(root)}\0".encode())
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def lowest(samples: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The `count` samples of the lowest `order`: a random choice that no order of work changes."""
    return sorted(samples, key=lambda sample: (sample["order"], sample["id"]))[:count]


def part_units(commits: Sequence[tuple[Unit, Commit]], stage: Stage, **more: Any) -> list[Unit]:
    """A unit for each Parquet file of these commits; `key` identifies the content, `location` is its path."""
    return [{"id": Path(name).stem, "source": unit["source"], "part": name, "key": stage.key(unit),
             "location": str(stage.parts / name), **more}
            for unit, commit in commits for name in commit.files if name.endswith(".parquet")]


def read_jsonl_zst(path: str | Path) -> list[dict[str, Any]]:
    """All records of a .jsonl.zst file that the pipeline wrote."""
    import zstandard

    with open(path, "rb") as file:
        data = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()
    return [json.loads(line) for line in data.splitlines()]
