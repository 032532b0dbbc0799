"""Clean documents, divided into training and held-out text as the datasets made of them are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ctllm_jax.dataset.shuffle import RANGE, as_text
from data_prep.stages.common import read_jsonl_zst


class Division(NamedTuple):
    """Documents on both sides, and their UTF-8 bytes."""

    train: int
    held_out: int
    train_bytes: int
    held_out_bytes: int


def divide(source: Path, train: Path, held_out: Path, *, fraction: float) -> Division:
    """Write the documents below `clean/SOURCE` to two JSONL files; about `fraction` of them to `held_out`.

    A document's side depends only on a hash of its text, the same as in `prepare`. So the tokenizer, which is trained
    before `prepare` runs, never sees held-out documents.
    """
    counts, sizes = [0, 0], [0, 0]
    with open(train, "w", encoding="utf-8") as kept, open(held_out, "w", encoding="utf-8") as apart:
        for record, side in read_sides(source, fraction=fraction):
            (apart if side else kept).write(json.dumps({"text": record["text"]}, ensure_ascii=False) + "\n")
            counts[side] += 1
            sizes[side] += len(record["text"].encode())
    return Division(*counts, *sizes)


def read_sides(source: Path, *, fraction: float) -> Iterator[tuple[dict[str, Any], bool]]:
    """The records below `clean/SOURCE` in order, each with whether it is held out."""
    for path in sorted(source.glob("*.jsonl.zst")):
        for record in read_jsonl_zst(path):
            yield record, as_text(record["text"], index=0, seed=0).split_value < int(fraction * RANGE)


def read_texts(path: Path) -> list[str]:
    """The texts of a JSONL file."""
    return [record["text"] for record in read_records(path)]


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file."""
    with open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)
