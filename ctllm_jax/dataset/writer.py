"""Write documents to shards, and shards to a dataset directory."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np

from ctllm_jax.dataset.manifest import FILE, Manifest, Shard, Split, TokenizerIdentity
from ctllm_jax.dataset.records import Record, encode, features


def smallest_dtype(id_count: int) -> str:
    """The dtype that holds ids below `id_count`."""
    return "uint16" if id_count <= 2**16 else "uint32"


def shard_name(name: str, split: str, index: int, count: int) -> str:
    """File name of a shard, as TFDS expects it."""
    return f"{name}-{split}.array_record-{index:05d}-of-{count:05d}"


class ShardWriter:
    """One stream of documents, each ended by EOD, cut into records of R tokens; the last record is padded with EOD."""

    def __init__(self, path: Path, *, record_tokens: int, dtype: str, eod_id: int):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._path = path
        self._writer = ArrayRecordWriter(str(path), "group_size:1")
        self._eod_id = eod_id
        self._buffer_R = np.full(record_tokens, eod_id, dtype)
        self._filled = 0
        self._ends: list[int] = []
        self._records = self._tokens = self._documents = self._text_bytes = 0

    def add(self, tokens: np.ndarray, *, text_bytes: int) -> None:
        """Append a document: its ids [n], without EOD, and the length of its text in UTF-8."""
        stream = np.append(tokens, np.asarray(self._eod_id, self._buffer_R.dtype))
        self._documents += 1
        self._text_bytes += text_bytes
        while len(stream):
            piece = stream[:len(self._buffer_R) - self._filled]
            self._buffer_R[self._filled:self._filled + len(piece)] = piece
            self._filled += len(piece)
            stream = stream[len(piece):]
            if not len(stream):
                self._ends.append(self._filled)
            if self._filled == len(self._buffer_R):
                self._write()

    def close(self) -> Shard:
        """Write the rest, and return what the file contains."""
        if self._filled:
            self._write()
        self._writer.close()
        with open(self._path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Shard(file=self._path.name, records=self._records, tokens=self._tokens, documents=self._documents,
                     text_bytes=self._text_bytes, size=self._path.stat().st_size, sha256=digest)

    def _write(self) -> None:
        self._buffer_R[self._filled:] = self._eod_id
        self._writer.write(encode(Record(self._buffer_R, self._filled, np.asarray(self._ends, np.int32))))
        self._records += 1
        self._tokens += self._filled
        self._filled = 0
        self._ends = []


def finish(directory: Path, *, name: str, record_tokens: int, dtype: str, eod_id: int, tokenizer: Path,
           tokenizer_sha256: str, vocab_size: int, config_sha256: str, splits: dict[str, list[Shard]]) -> Manifest:
    """Put the tokenizer, the TFDS metadata and finally the manifest next to the shards in `directory`."""
    from ctllm_jax import __version__

    copy = "tokenizer" + tokenizer.suffix
    shutil.copyfile(tokenizer, directory / copy)
    write_tfds_metadata(directory, name=name, record_tokens=record_tokens, dtype=dtype, splits=splits)
    manifest = Manifest(
        name=name, record_tokens=record_tokens, dtype=dtype, eod_id=eod_id,
        tokenizer=TokenizerIdentity(file=copy, sha256=tokenizer_sha256, vocab_size=vocab_size),
        config_sha256=config_sha256, created_by=f"ctllm_jax {__version__}",
        splits={split: Split(tuple(shards)) for split, shards in splits.items()})
    (directory / FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def write_tfds_metadata(directory: Path, *, name: str, record_tokens: int, dtype: str,
                        splits: dict[str, list[Shard]]) -> None:
    """Write dataset_info.json and features.json, so that `tfds.builder_from_directory(DIR).as_data_source()` can read
    the dataset."""
    import tensorflow_datasets as tfds

    infos = [tfds.core.SplitInfo(
        name=split, shard_lengths=[shard.records for shard in shards], num_bytes=sum(shard.size for shard in shards),
        filename_template=tfds.core.ShardedFileTemplate(dataset_name=name, split=split, data_dir=directory,
                                                        filetype_suffix="array_record"))
        for split, shards in splits.items()]
    tfds.folder_dataset.write_metadata(data_dir=directory, features=features(record_tokens, dtype), split_infos=infos,
                                       check_data=False)
