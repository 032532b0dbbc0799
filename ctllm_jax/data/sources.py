"""Resolve a source of a config to a dataset directory; text is tokenized and packed once, and cached."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ctllm_jax.config.data import BuildConfig, DataConfig, SourceConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from ctllm_jax.dataset.build import TRAIN, build, build_from_files
from ctllm_jax.dataset.manifest import FILE, find_dataset
from ctllm_jax.dataset.reader import Dataset
from ctllm_jax.dataset.shard_cache import ShardCache
from ctllm_jax.dataset.text import Document, Quarantine, find_files
from ctllm_jax.storage import is_remote, open_path

_TFDS_FILE, _SHARDS = "dataset_info.json", "shards"
logger = logging.getLogger(__name__)
_BYTES_SINCE = "0.1.0"
"""The version since which the same text gives the same dataset: runs of it resume on what was prepared for them."""


class OpenedSource(NamedTuple):
    """The dataset directory of a source, and its training split."""

    dataset: Dataset
    split: str


def open_source(name: str, source: SourceConfig, config: DataConfig, *, sequence_length: int) -> OpenedSource:
    """Return the dataset directory of a source.

    Text files and TFDS directories with a text feature are converted to one in `config.cache_dir`, with the defaults of
    `prepare`, named by a hash of content, tokenizer and options. One process of a host does this while the others wait.
    Raises UserError if the source cannot be read.
    """
    path = open_path(source.path)
    if is_remote(path):
        return OpenedSource(_from_store(name, path, config), source.split)
    if not path.exists():
        remote = ": copy or mount it first" if "://" in source.path else ""
        raise UserError(f"data.sources.{name}.path={source.path} does not exist{remote}")
    if found := find_dataset(path):
        return OpenedSource(Dataset(found), source.split)
    if config.tokenizer is None:
        raise UserError(f"data.tokenizer must be given: data.sources.{name}.path={source.path} is still text (a "
                        f"dataset directory has a {FILE})")
    if (path / _TFDS_FILE).exists():
        # The split of the TFDS directory is all the text; it is divided into a training and a held-out split.
        return OpenedSource(_from_tfds(name, path, source, config, sequence_length), TRAIN)
    return OpenedSource(_from_files(path, source, config, sequence_length), source.split)


def check_room(datasets: list[Dataset], config: DataConfig) -> None:
    """Check the size of the shard cache. Samples are drawn from the whole data, so a run reads every shard all the
    time.

    Raises:
      UserError: the sources on object stores are larger than the cache.
    """
    sizes = {shard.sha256: shard.size for dataset in datasets if dataset.cache is not None
             for split in dataset.manifest.splits.values() for shard in split.shards}
    total = sum(sizes.values())
    if total > config.cache_gb * 1e9:
        raise UserError(f"data.cache_gb={config.cache_gb:g}: the sources on object stores are {total / 1e9:.4g} GB, and"
                        f" samples are drawn from all of it: give data.cache_gb={math.ceil(total / 1e9)} and a"
                        f" data.cache_dir with that much room (it is {config.cache_dir}), or mount the bucket")


def _from_store(name: str, path: Path, config: DataConfig) -> Dataset:
    found = find_dataset(path)
    if found is None:
        raise UserError(f"data.sources.{name}.path={path} holds no dataset directory (it has no {FILE}): on an object"
                        " store it must be what prepare made; copy text or a TFDS directory to a disk")
    return Dataset(found, cache=ShardCache(Path(config.cache_dir) / _SHARDS, limit=round(config.cache_gb * 1e9)))


def _from_files(path: Path, source: SourceConfig, config: DataConfig, sequence_length: int) -> Dataset:
    tokenizer = load_tokenizer(config.tokenizer)
    options = _options(path, find_files([source.path]), source, config, tokenizer, sequence_length)
    return _made_once(options, lambda: build_from_files(options, tokenizer))


def _from_tfds(name: str, path: Path, source: SourceConfig, config: DataConfig, sequence_length: int) -> Dataset:
    import grain
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(path)
    if source.split not in builder.info.splits:
        raise UserError(f"data.sources.{name}: {path} has no split {source.split!r}; its splits: "
                        f"{', '.join(builder.info.splits) or 'none'}")
    if source.text_field not in builder.info.features:
        raise UserError(f"data.sources.{name}: {path} has no feature {source.text_field!r}; its features: "
                        f"{', '.join(sorted(builder.info.features))}")
    try:
        records = builder.as_data_source(source.split)
    except NotImplementedError as error:
        raise UserError(f"data.sources.{name}: {path} cannot be read at random, which needs array_record files: "
                        f"{error}") from None

    def read(quarantine: Quarantine) -> Iterator[Document]:
        texts = grain.MapDataset.source(records).map(lambda record: record[source.text_field])
        # No threads: TFDS imports parts of itself when it first decodes, and two threads may then wait forever.
        for line, value in enumerate(texts.to_iter_dataset(grain.ReadOptions(0, 0)), 1):
            try:
                yield Document(value.decode("utf-8") if isinstance(value, bytes) else str(value), path, line)
            except UnicodeDecodeError as error:
                quarantine.put(path, line, f"invalid UTF-8 at byte {error.start} of {source.text_field!r}", value)

    files = [Path(file) for file in builder.info.splits[source.split].filepaths]
    tokenizer = load_tokenizer(config.tokenizer)
    options = _options(path, files, source, config, tokenizer, sequence_length)
    size = sum(file.stat().st_size for file in files)
    return _made_once(options, lambda: build(read, options, tokenizer, expected_bytes=size))


def _options(path: Path, files: list[Path], source: SourceConfig, config: DataConfig,
             tokenizer: Tokenizer, sequence_length: int) -> BuildConfig:
    """How and where a source is prepared; the directory's name is a hash of everything that determines its bytes."""
    record_tokens = BuildConfig.model_fields["record_tokens"].default
    if sequence_length % record_tokens and record_tokens % sequence_length:
        record_tokens = sequence_length
    key = {"text": _content_sha256(files), "text_field": source.text_field, "record_tokens": record_tokens,
           "tokenizer": tokenizer.sha256, "version": _BYTES_SINCE}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    output = Path(config.cache_dir) / name
    logger.info("%s, tokenized, is %s", path, output)
    return BuildConfig(input=[str(path)], output=str(output), tokenizer=config.tokenizer,
                         text_field=source.text_field, record_tokens=record_tokens)


def _made_once(options: BuildConfig, make) -> Dataset:
    output = Path(options.output)
    if not output.exists():
        try:
            make()
        except (UserError, OSError):
            # Another process or host was first while this one waited for the lock; other errors are passed on.
            if not output.exists():
                raise
    return Dataset(output)


def _content_sha256(files: list[Path]) -> str:
    digests = []
    for path in files:
        with open(path, "rb") as file:
            digests.append([path.suffix, hashlib.file_digest(file, "sha256").hexdigest()])
    return hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()
