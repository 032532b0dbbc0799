"""Filtered parts to the LSH keys of their documents."""

from __future__ import annotations

from typing import Any

from data_prep.commits import Output, Unit
from data_prep.stages.common import config_of, read_part, run_unit, write_part

VERSION = 1
PLACE = ("id", "file", "position")
"""What, after the source's priority, decides which copy stays."""


def band_column(band: int) -> str:
    """Name of the column of a band's keys."""
    return f"band_{band:02d}"


def run(unit: Unit, options: dict[str, Any]) -> dict[str, Any]:
    """Signatures of the documents at `unit["location"]` that are not in `unit["dropped"]`, as band keys."""
    return run_unit(unit, options, _keys)


def _keys(unit: Unit, options: dict[str, Any], output: Output) -> None:
    import numpy as np
    import pyarrow as pa

    from data_prep.dedup.minhash import band_keys, signatures

    config = config_of(options).minhash
    part = read_part(unit["location"], ["row", "text"], without=unit["dropped"])
    made = signatures(part["text"], config)
    enough = made.long_enough
    output.counters |= {"documents": len(enough), "too_short": int((~enough).sum()),
                        "bytes": sum(len(text.encode("utf-8")) for text in part["text"])}
    if not enough.any():
        return
    keys = band_keys(made.values[enough], config.bands, config.rows)
    columns: dict[str, Any] = {"row": np.asarray(part["row"], np.int32)[enough]}
    columns |= {band_column(band): keys[:, band] for band in range(config.bands)}
    schema = pa.schema([pa.field("row", pa.int32(), nullable=False),
                        *(pa.field(band_column(band), pa.uint64(), nullable=False) for band in range(config.bands))])
    write_part(output.file(f"{unit['id']}.parquet"), columns, schema)
