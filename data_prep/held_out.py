"""Clean documents, divided into training and held-out text as the datasets made of them are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

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

    A document's side depends on a hash of its text alone, the one that `prepare` uses: what is trained on before
    `prepare` tokenizes (the tokenizer itself) has then seen nothing of what is held out.
    """
    counts, sizes = [0, 0], [0, 0]
    with open(train, "w", encoding="utf-8") as kept, open(held_out, "w", encoding="utf-8") as apart:
        for path in sorted(source.glob("*.jsonl.zst")):
            for record in read_jsonl_zst(path):
                text = as_text(record["text"], index=0, seed=0)
                side = int(text.split_value < int(fraction * RANGE))
                (apart if side else kept).write(json.dumps({"text": record["text"]}, ensure_ascii=False) + "\n")
                counts[side] += 1
                sizes[side] += len(text.data)
    return Division(*counts, *sizes)


def read_texts(path: Path) -> list[str]:
    """The texts of a JSONL file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]
