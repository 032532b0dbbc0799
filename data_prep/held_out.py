"""Documents without their copies, divided into training and held-out text, as `prepare` will divide them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from ctllm_jax.dataset.shuffle import Text


class Division(NamedTuple):
    """What a source came to: documents read, exact copies dropped, and the rest on both sides with its UTF-8 bytes."""

    read: int
    copies: int
    train: int
    held_out: int
    train_bytes: int
    held_out_bytes: int


def divide(source: Path, train: Path, held_out: Path, *, fraction: float) -> Division:
    """Write the distinct records of a JSONL file to two others; about `fraction` of them to `held_out`.

    Copies are dropped before the division: after it, they would carry held-out documents into training. A document's
    side depends on a hash of its text alone, the one that `prepare` uses: what is trained on before `prepare` (a
    tokenizer) has then seen nothing of what is held out.
    """
    seen: set[bytes] = set()
    read = 0
    counts, sizes = [0, 0], [0, 0]
    with open(source, encoding="utf-8") as lines, open(train, "w", encoding="utf-8") as kept, \
            open(held_out, "w", encoding="utf-8") as apart:
        for line in lines:
            read += 1
            data = json.loads(line)["text"].encode()
            digest = hashlib.blake2b(data, digest_size=16).digest()
            if digest in seen:
                continue
            seen.add(digest)
            side = int(Text(0, digest, 0, data).split_value < int(fraction * 2**64))
            (apart if side else kept).write(line)
            counts[side] += 1
            sizes[side] += len(data)
    return Division(read, read - len(seen), *counts, *sizes)


def read_texts(path: Path) -> list[str]:
    """The texts of a JSONL file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]
