"""The manifest of a dataset directory: its contents in numbers and checksums."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctllm_jax.config.errors import UserError, check_format
from ctllm_jax.storage import open_path

FORMAT = 1
FILE = "manifest.json"
_TOTALS = ("tokens", "documents", "text_bytes", "records")


@dataclass(frozen=True)
class Shard:
    """One ArrayRecord file: one stream of tokens. `size` is in bytes, `sha256` is of the whole file."""

    file: str
    records: int
    tokens: int
    documents: int
    text_bytes: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of a split. Totals are sums over them; `text_bytes` counts the UTF-8 of the documents."""

    shards: tuple[Shard, ...]

    def total(self, field: str) -> int:
        """Sum of `tokens`, `documents`, `text_bytes`, `records` or `size` over the shards."""
        return sum(getattr(shard, field) for shard in self.shards)


@dataclass(frozen=True)
class TokenizerIdentity:
    """The tokenizer's copy inside the directory, its hash, and its number of ids."""

    file: str
    sha256: str
    vocab_size: int


@dataclass(frozen=True)
class Manifest:
    """Everything that a reader needs to know about a dataset before it opens a shard.

    `record_tokens` is R; `dtype` of the tokens is uint16 or uint32; `eod_id` ends every document; `config_sha256` is
    the hash of the options that the dataset was made with.
    """

    name: str
    record_tokens: int
    dtype: str
    eod_id: int
    tokenizer: TokenizerIdentity
    config_sha256: str
    created_by: str
    splits: dict[str, Split]

    @property
    def id_count(self) -> int:
        """Number of ids that may occur; a model needs at least this vocabulary."""
        return max(self.tokenizer.vocab_size, self.eod_id + 1)

    def to_json(self) -> str:
        """The text of manifest.json."""
        values = {"format": FORMAT, **{field: getattr(self, field) for field in (
            "name", "record_tokens", "dtype", "eod_id")},
            "tokenizer": dataclasses.asdict(self.tokenizer),
            "config_sha256": self.config_sha256, "created_by": self.created_by,
            "splits": {name: {**{field: split.total(field) for field in _TOTALS},
                              "shards": [dataclasses.asdict(shard) for shard in split.shards]}
                       for name, split in self.splits.items()}}
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def find_dataset(directory: Path | str) -> Path | None:
    """Return the dataset directory of a path: the path itself, or the only one that `prepare` made in it.

    None if there is none. Raises UserError if there are several.
    """
    directory = open_path(directory)
    if (directory / FILE).exists():
        return directory
    found = sorted(path.parent for path in directory.glob(f"*/{FILE}")) if directory.is_dir() else []
    if len(found) > 1:
        raise UserError(f"{directory} holds several datasets: name one of {', '.join(map(str, found))}, or each "
                        f"of them as a source: data.sources.{found[0].name}.path={found[0]} …")
    return found[0] if found else None


def read_manifest(directory: Path | str) -> Manifest:
    """Read the manifest of a dataset directory. Raises UserError if it is missing, damaged or inconsistent."""
    path = open_path(directory) / FILE
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{directory} is not a dataset directory: it has no {FILE}") from None
    except NotADirectoryError:
        raise UserError(f"{directory} is a file, and not a dataset directory: give the folder that holds {FILE}"
                        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return _parse(values, path)


def manifest_sha256(directory: Path | str) -> str:
    """Hash of manifest.json, which contains the hash of every shard, so it identifies the whole dataset."""
    return hashlib.sha256((open_path(directory) / FILE).read_bytes()).hexdigest()


def _parse(values: Any, path: Path) -> Manifest:
    check_format(values.get("format") if isinstance(values, dict) else None, newest=FORMAT, where=path)
    try:
        splits = {name: Split(tuple(Shard(**shard) for shard in split["shards"]))
                  for name, split in values["splits"].items()}
        manifest = Manifest(
            **{field: values[field] for field in ("name", "record_tokens", "dtype", "eod_id", "config_sha256",
                                                  "created_by")},
            tokenizer=TokenizerIdentity(**values["tokenizer"]), splits=splits)
        stated = {(name, field): split[field] for name, split in values["splits"].items() for field in _TOTALS}
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing") from None
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    _check(manifest, stated, path)
    return manifest


def _check(manifest: Manifest, stated: dict[tuple[str, str], int], path: Path) -> None:
    if manifest.dtype not in ("uint16", "uint32"):
        raise UserError(f"{path}: dtype={manifest.dtype!r} must be uint16 or uint32")
    for field, value in (("record_tokens", manifest.record_tokens), ("tokenizer.vocab_size",
                                                                     manifest.tokenizer.vocab_size)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{path}: {field}={value!r} must be a positive integer")
    if not _is_name(manifest.tokenizer.file):
        raise UserError(f"{path}: tokenizer.file={manifest.tokenizer.file!r} must be the name of a file beside it")
    if not isinstance(manifest.eod_id, int) or not 0 <= manifest.eod_id <= np.iinfo(manifest.dtype).max:
        raise UserError(f"{path}: eod_id={manifest.eod_id!r} must be an id that {manifest.dtype} can hold")
    for name, split in manifest.splits.items():
        for shard in split.shards:
            _check_shard(shard, f"{path}: split {name}")
    for (name, field), value in stated.items():
        total = manifest.splits[name].total(field)
        if total != value:
            raise UserError(f"{path}: split {name} states {field}={value}, its shards sum to {total}")
    for name, split in manifest.splits.items():
        for shard in split.shards:
            expected = -(-shard.tokens // manifest.record_tokens)
            if shard.records != expected or shard.tokens < 1:
                raise UserError(f"{path}: {shard.file} of split {name} states {shard.records} records for "
                                f"{shard.tokens} tokens, which make {expected} of {manifest.record_tokens}")


def _is_name(value: Any) -> bool:
    """Whether a value names a file in the folder itself; of "..", pathlib's name is ".."."""
    return isinstance(value, str) and value not in ("", "..") and Path(value).name == value


def _check_shard(shard: Shard, where: str) -> None:
    """Check that numbers are numbers, and that the file is next to the manifest."""
    for name, value in dataclasses.asdict(shard).items():
        if name == "file":
            if not _is_name(value):
                raise UserError(f"{where}: {value!r} must be the name of a file beside it")
        elif name == "sha256":
            if not isinstance(value, str):
                raise UserError(f"{where}: {shard.file}: sha256={value!r} must be a hash in hexadecimal")
        elif type(value) is not int or value < 0:
            raise UserError(f"{where}: {shard.file}: {name}={value!r} must be a whole number")
