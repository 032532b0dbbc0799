"""Verify a dataset directory against its manifest, record by record."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ctllm_jax.config.errors import UserError
from ctllm_jax.dataset.manifest import Manifest, Shard, read_manifest
from ctllm_jax.dataset.reader import ShardReader


def verify(directory: Path | str, *, progress: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """Return all problems of a dataset, one line each with the file; an empty list if there are none.

    Checks sizes and hashes of the shards and of the tokenizer, decodes every record, counts tokens and documents,
    looks for EOD at every document's end, and reads the TFDS metadata. Progress is (bytes done, bytes in all).
    """
    directory = Path(directory)
    try:
        manifest = read_manifest(directory)
    except UserError as error:
        return [str(error)]
    problems = [*_check_tokenizer(directory, manifest), *_check_files(directory, manifest)]
    total = sum(split.total("size") for split in manifest.splits.values())
    done = 0
    for split in manifest.splits.values():
        for shard in split.shards:
            problems += [f"{directory / shard.file}: {problem}" for problem in _check_shard(directory, manifest, shard)]
            done += shard.size
            progress(done, total)
    return problems + _check_tfds(directory, manifest)


def _check_tokenizer(directory: Path, manifest: Manifest) -> Iterator[str]:
    path = directory / manifest.tokenizer.file
    if not path.exists():
        yield f"{path}: missing"
    elif hashlib.sha256(path.read_bytes()).hexdigest() != manifest.tokenizer.sha256:
        yield f"{path}: its sha256 is not the manifest's: the tokenizer was changed"


def _check_files(directory: Path, manifest: Manifest) -> Iterator[str]:
    named = {shard.file for split in manifest.splits.values() for shard in split.shards}
    for path in sorted(directory.glob("*.array_record-*")):
        if path.name not in named:
            yield f"{path}: the manifest does not name it"


def _check_shard(directory: Path, manifest: Manifest, shard: Shard) -> Iterator[str]:
    path = directory / shard.file
    if not path.exists():
        yield "missing"
        return
    size = path.stat().st_size
    if size != shard.size:
        yield f"{'truncated' if size < shard.size else 'changed'}: {size} bytes, the manifest says {shard.size}"
    else:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                yield "its sha256 is not the manifest's: bytes were changed"
    reader = ShardReader(path, shard, record_tokens=manifest.record_tokens, dtype=manifest.dtype)
    try:
        reader.open()
    except UserError as error:
        yield str(error).removeprefix(f"{path} ")
        return
    tokens = documents = 0
    for index in range(shard.records):
        try:
            record = reader.record(index)
        except UserError as error:
            yield f"record {index} cannot be read: {error.__cause__}"
            continue
        tokens += record.num_tokens
        documents += len(record.ends)
        if record.num_tokens < manifest.record_tokens and index < shard.records - 1:
            yield f"record {index} holds {record.num_tokens} tokens, only the last may hold fewer than all"
        if (record.tokens[record.ends - 1] != manifest.eod_id).any():
            yield f"record {index}: a document does not end in EOD ({manifest.eod_id})"
        if int(record.tokens.max()) >= manifest.id_count:
            yield f"record {index}: id {int(record.tokens.max())} is above the tokenizer's {manifest.id_count - 1}"
    for field, found, stated in (("tokens", tokens, shard.tokens), ("documents", documents, shard.documents)):
        if found != stated:
            yield f"{found} {field} can be read, the manifest says {stated}"


def _check_tfds(directory: Path, manifest: Manifest) -> list[str]:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(directory)
        for name, split in manifest.splits.items():
            source = builder.as_data_source(name)
            if len(source) != split.total("records"):
                return [f"{directory}: TFDS sees {len(source)} records in {name}, the manifest says "
                        f"{split.total('records')}"]
            if source and not np.array_equal(source[0]["tokens"].shape, (manifest.record_tokens,)):
                return [f"{directory}: TFDS sees records of shape {source[0]['tokens'].shape} in {name}"]
    # Any error of TFDS here means that its metadata is wrong.
    except Exception as error:
        return [f"{directory}: TFDS cannot read its metadata: {error}"]
    return []
