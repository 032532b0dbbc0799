"""Clean text to dataset directories: ids in parallel, then shards of documents in an order that only the seed decides.

The same text and options give the same bytes as `ctllm_jax.dataset.build` does in one process.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.prepare import PrepareConfig
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.dataset.build import TRAIN, VALIDATION
from ctllm_jax.dataset.manifest import Manifest, Shard, read_manifest
from ctllm_jax.dataset.pack import places_of, tokenize
from ctllm_jax.dataset.shuffle import RANGE, as_text, held_out_limit
from ctllm_jax.dataset.staging import exclusive, staged
from ctllm_jax.dataset.writer import ShardWriter, finish, shard_name, smallest_dtype
from data_prep import runs
from data_prep.commits import Commit, Output, Stage, Unit, fingerprint
from data_prep.runs import INDEX, Run
from data_prep.stages.common import config_of, read_jsonl_zst, run_unit

VERSION = 1

_SHARD_COUNTS = ("records", "tokens", "documents", "text_bytes", "size", "sha256")


class Vocabulary(NamedTuple):
    """Properties of a tokenizer that determine a dataset's bytes, apart from the ids themselves."""

    sha256: str
    vocab_size: int
    eod_id: int
    dtype: str


@functools.lru_cache(maxsize=2)
def load(path: str):
    """The tokenizer of a file; read once in a process."""
    return load_tokenizer(path)


def vocabulary(config: PrepareConfig) -> Vocabulary:
    """The tokenizer of a config. Raises UserError if it cannot be loaded, or there is no id to end documents."""
    tokenizer = load(config.tokenizer)
    eod_id = tokenizer.eos_id if config.eod_id is None else config.eod_id
    if eod_id is None:
        raise UserError(f"eod_id must be given: {config.tokenizer} has no EOS that could end documents")
    dtype = smallest_dtype(max(tokenizer.vocab_size, eod_id + 1))
    return Vocabulary(tokenizer.sha256, tokenizer.vocab_size, eod_id, dtype)


def run(unit: Unit, options: dict[str, Any]) -> dict[str, Any]:
    """Ids of the clean part at `unit["location"]`, its documents sorted by their key."""
    return run_unit(unit, options, _tokenize)


def _tokenize(unit: Unit, options: dict[str, Any], output: Output) -> None:
    config = config_of(options)
    records = read_jsonl_zst(unit["location"])
    texts = sorted(as_text(record["text"], index=index, seed=config.seed) for index, record in enumerate(records))
    ids = output.file(f"{unit['id']}.ids")
    made = tokenize(texts, load(config.tokenizer), ids, dtype=options["dtype"])
    index = np.empty(len(texts), INDEX)
    index["key"] = [text.key for text in texts]
    index["split"] = [text.split_value for text in texts]
    index["tokens"], index["text_bytes"] = made.tokens, made.text_bytes
    with open(output.file(f"{unit['id']}.npy"), "wb") as file:
        np.save(file, index)
    split = index["split"]
    output.counters |= {"documents": len(texts), "tokens": int(made.tokens.sum()),
                        "text_bytes": int(made.text_bytes.sum()), "lowest": int(split.min()),
                        "highest": int(split.max())}


def plan_merges(tokenized: Sequence[tuple[Unit, Commit]], parts: Path, level: int) -> list[Unit]:
    """Tokenized parts of one source to fewer, each of which a unit merges; none where all can be open at once."""
    if len(tokenized) <= runs.MOST:
        return []
    return [{"id": f"{tokenized[0][0]['source']}-level-{level}-{place:05d}", "source": tokenized[0][0]["source"],
             "content": fingerprint([tokenized[part][1].key for part in group]),
             "location": [str(parts / f"{tokenized[part][0]['id']}.npy") for part in group]}
            for place, group in enumerate(runs.groups(len(tokenized)))]


def merge(unit: Unit, options: dict[str, Any]) -> dict[str, Any]:
    """The tokenized parts at `unit["location"]` as one."""
    return run_unit(unit, options, _merge)


def _merge(unit: Unit, options: dict[str, Any], output: Output) -> None:
    output.counters["documents"] = runs.merge(
        Path(), [Run(name) for name in unit["location"]], output.file(f"{unit['id']}.npy"),
        output.file(f"{unit['id']}.ids"), dtype=options["dtype"])


def plan_shards(names: Sequence[Path], content: str, config: PrepareConfig, source: str) -> list[Unit]:
    """The shards of a source: which documents, by range of key, go where. `names` are the indexes of its runs, and
    `content` identifies their content."""
    indexes = [runs.read_index(Path(), Run(str(name))) for name in names]
    before = [np.concatenate([[0], np.cumsum(own["tokens"])]) for own in indexes]
    index = np.concatenate(indexes)
    index = index[np.argsort(index["key"], kind="stable")]
    limit = held_out_limit(int(index["split"].min()), int(index["split"].max()), config.validation_fraction)
    held_out = index["split"] < np.uint64(limit)
    units = []
    for split, chosen in ((TRAIN, index[~held_out]), (VALIDATION, index[held_out])):
        if not len(chosen):
            continue
        places = places_of(chosen["tokens"] + 1, config.shards if split == TRAIN else 1)
        # A shard is a range of keys, so documents of one key lie in one shard.
        lows = np.unique(chosen["key"][np.unique(places, return_index=True)[1]])
        edges = [[0, *np.searchsorted(own["key"], lows[1:]).tolist(), len(own)] for own in indexes]
        for shard, (low, high) in enumerate(zip([0, *lows[1:].tolist()], [*lows[1:].tolist(), RANGE], strict=True)):
            location = [[str(name), own[shard], own[shard + 1] - own[shard], int(tokens[own[shard]])]
                        for name, own, tokens in zip(names, edges, before, strict=True) if own[shard] < own[shard + 1]]
            units.append({"id": shard_name(source, split, shard, len(lows)), "source": source, "split": split,
                          "limit": limit, "low": low, "high": high, "content": content, "location": location})
    return units


def pack(unit: Unit, options: dict[str, Any]) -> dict[str, Any]:
    """One shard: the documents of `unit["split"]` with low ≤ key < high, from the runs at `unit["location"]`.

    A run is its index alone, or a Run's values. More than can be open at once are merged first, into a folder that is
    removed again.
    """
    return run_unit(unit, options, _pack)


def _pack(unit: Unit, options: dict[str, Any], output: Output) -> None:
    config, folder = config_of(options), Path(options["tokenized"])
    own = [Run(place) if isinstance(place, str) else Run(*place) for place in unit["location"]]
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=output.parts) as scratch:
        number = 0
        while len(own) > runs.MOST:
            fewer = []
            for group in runs.groups(len(own)):
                path = Path(scratch) / f"{number:06d}.npy"
                runs.merge(folder, [own[place] for place in group], path, path.with_suffix(".ids"),
                           dtype=options["dtype"])
                fewer.append(Run(str(path)))
                number += 1
            own = fewer
        documents = runs.merged(folder, own)
        index = documents.index
        wanted = (index["key"] >= np.uint64(unit["low"])) & (
            (index["split"] >= np.uint64(unit["limit"])) == (unit["split"] == TRAIN))
        if unit["high"] < RANGE:
            wanted &= index["key"] < np.uint64(unit["high"])
        documents = runs.Merged(*(column[wanted] for column in documents))
        writer = ShardWriter(output.file(unit["id"]), record_tokens=config.record_tokens, dtype=options["dtype"],
                             eod_id=options["eod_id"])
        text_bytes = documents.index["text_bytes"].tolist()
        for tokens, length in zip(runs.read_ids(folder, own, documents, dtype=options["dtype"]), text_bytes,
                                  strict=True):
            writer.add(tokens, text_bytes=length)
        shard = writer.close()
    output.counters |= {name: getattr(shard, name) for name in _SHARD_COUNTS}


def assemble(target: Path, source: str, shards: Sequence[tuple[Unit, Commit]], stage: Stage, config: PrepareConfig,
             known: Vocabulary, config_sha256: str) -> Manifest:
    """The dataset directory `target` from its shards; what was there is replaced if it is another."""
    splits: dict[str, list[Shard]] = {}
    for unit, commit in shards:
        counts = {name: commit.counters[name] for name in _SHARD_COUNTS}
        splits.setdefault(unit["split"], []).append(Shard(file=unit["id"], **counts))
    with exclusive(target):
        if target.exists():
            manifest = _standing(target)
            wanted = [shard.sha256 for split in splits.values() for shard in split]
            standing = [shard for split in manifest.splits.values() for shard in split.shards]
            if manifest.config_sha256 == config_sha256 and wanted == [shard.sha256 for shard in standing] and all(
                    (target / shard.file).is_file() and (target / shard.file).stat().st_size == shard.size
                    for shard in standing):
                return manifest
            shutil.rmtree(target)
        with staged(target) as directory:
            for unit, _ in shards:
                _link(stage.parts / unit["id"], directory / unit["id"])
            return finish(directory, name=source, record_tokens=config.record_tokens, dtype=known.dtype,
                          eod_id=known.eod_id, tokenizer=Path(config.tokenizer), tokenizer_sha256=known.sha256,
                          vocab_size=known.vocab_size, config_sha256=config_sha256, splits=splits)


def remove(target: Path) -> None:
    """Remove the dataset directory of a source that has no documents any more."""
    with exclusive(target):
        if target.exists():
            _standing(target)
            shutil.rmtree(target)


def _standing(target: Path) -> Manifest:
    """The manifest of a dataset written here. Raises UserError for any other folder."""
    try:
        return read_manifest(target)
    except UserError as error:
        raise UserError(f"{target} is in the way, and no dataset directory that prepare may replace: {error}") from None


def _link(source: Path, target: Path) -> None:
    """Link a file under another name, or copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
