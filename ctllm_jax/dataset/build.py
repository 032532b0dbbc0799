"""Convert documents to a dataset directory: spill by hash, drop duplicates, split, tokenize, pack; one function per
stage."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ctllm_jax.config.data import BuildConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.dataset.manifest import Manifest
from ctllm_jax.dataset.pack import TextTokenizer, Tokenized, pack, tokenize
from ctllm_jax.dataset.shuffle import held_out_limit, read_bucket, spill
from ctllm_jax.dataset.staging import exclusive, staged
from ctllm_jax.dataset.text import Document, Quarantine, find_files, read_documents
from ctllm_jax.dataset.writer import finish, smallest_dtype

TRAIN, VALIDATION = "train", "validation"
_EXPANSION = {".gz": 4, ".zst": 4, ".parquet": 4}
logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with the stage, the bytes done and its total bytes."""


@dataclass
class Summary:
    """Statistics of the documents. `duplicates`, `bad` and `empty` are not in the manifest's counts."""

    manifest: Manifest
    read: int
    bad: int
    empty: int
    duplicates: int


def build_from_files(config: BuildConfig, tokenizer: TextTokenizer, *,
                     progress: Progress = lambda stage, done, total: None) -> Summary:
    """Make the dataset directory `config.output` from the text files of `config.input`; see `build`."""
    files = find_files(config.input)
    total = sum(file.stat().st_size for file in files)
    expected = sum(file.stat().st_size * _EXPANSION.get(file.suffix, 1) for file in files)

    def read(quarantine: Quarantine) -> Iterator[Document]:
        return read_documents(files, text_field=config.text_field, quarantine=quarantine,
                              progress=lambda done: progress("read", done, total))

    return build(read, config, tokenizer, expected_bytes=expected, progress=progress)


def build(read: Callable[[Quarantine], Iterator[Document]], config: BuildConfig, tokenizer: TextTokenizer, *,
          expected_bytes: int, progress: Progress = lambda stage, done, total: None) -> Summary:
    """Make the dataset directory `config.output` from any documents: `read` yields them, and sets bad ones aside.

    The directory appears complete or not at all. The same documents and options give the same bytes, in any order of
    the documents. Raises UserError if more than `max_bad` records are bad, or nothing is left.
    """
    eod_id = tokenizer.eos_id if config.eod_id is None else config.eod_id
    if eod_id is None:
        raise UserError(f"eod_id must be given: {config.tokenizer} has no EOS that could end documents")
    output = Path(config.output)
    with exclusive(output):
        if output.exists():
            raise UserError(f"output={config.output} exists already: remove it, or write elsewhere")
        quarantine = Quarantine(output.with_name(output.name + ".quarantine.jsonl"), max_bad=config.max_bad)
        quarantine.path.unlink(missing_ok=True)
        with staged(output) as directory:
            summary = _fill(directory, read, quarantine, tokenizer, eod_id, config, expected_bytes, progress)
            if quarantine.count:
                quarantine.path.rename(directory / "quarantine.jsonl")
    return summary


def _fill(directory: Path, read, quarantine: Quarantine, tokenizer: TextTokenizer, eod_id: int, config: BuildConfig,
          expected_bytes: int, progress: Progress) -> Summary:
    dtype = smallest_dtype(max(tokenizer.vocab_size, eod_id + 1))
    work = directory / "work"
    work.mkdir()
    spilled = spill(read(quarantine), work, seed=config.seed, expected_bytes=expected_bytes)
    if not spilled.documents:
        raise UserError(f"input={', '.join(config.input)} holds no text: {spilled.empty} empty documents, "
                        f"{quarantine.count} bad records")
    limit = held_out_limit(spilled.lowest_split_value, spilled.highest_split_value, config.validation_fraction)
    if config.validation_fraction and not limit:
        logger.warning("a single distinct document leaves nothing to hold out: there is no validation split")
    parts: dict[str, list[Tokenized]] = {TRAIN: [], VALIDATION: []}
    kept = done = 0
    for bucket, size in zip(spilled.buckets, spilled.sizes, strict=True):
        texts = read_bucket(bucket, deduplicate=config.deduplicate)
        bucket.unlink()
        kept += len(texts)
        for split, members in ((TRAIN, [text for text in texts if text.split_value >= limit]),
                               (VALIDATION, [text for text in texts if text.split_value < limit])):
            if members:
                path = work / f"{bucket.name}-{split}"
                parts[split].append(tokenize(members, tokenizer, path, dtype=dtype))
        done += size
        progress("tokenize", done, spilled.text_bytes)
    splits = {split: pack(tokenized, directory, name=config.name, split=split, record_tokens=config.record_tokens,
                          shards=config.shards if split == TRAIN else 1, dtype=dtype, eod_id=eod_id)
              for split, tokenized in parts.items() if tokenized}
    for left in work.iterdir():
        left.unlink()
    work.rmdir()
    manifest = finish(directory, name=config.name, record_tokens=config.record_tokens, dtype=dtype, eod_id=eod_id,
                      tokenizer=tokenizer.path, tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size,
                      config_sha256=options_sha256(config, tokenizer, eod_id), splits=splits)
    return Summary(manifest, read=spilled.documents + spilled.empty + quarantine.count, bad=quarantine.count,
                   empty=spilled.empty, duplicates=spilled.documents - kept)


def options_sha256(config: BuildConfig, tokenizer: TextTokenizer, eod_id: int) -> str:
    """Hash of everything except the text that determines the bytes of a dataset."""
    values = config.model_dump(mode="json", exclude={"input", "output", "tokenizer", "eod_id", "max_bad"})
    values |= {"eod_id": eod_id, "tokenizer_sha256": tokenizer.sha256}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
