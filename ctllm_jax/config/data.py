"""Where batches come from (`data`), and how text becomes a dataset directory (`prepare`, `tokenizer`)."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ctllm_jax.config.base import Section, key
from ctllm_jax.config.folders import Links


class SourceConfig(Section):
    """One source of a mixture. A bare value is its path."""

    shorthand = "path"

    path: str = key(...,
                    "a dataset directory (also on gs://), any TFDS directory with a text feature, or text: .jsonl(.gz|.zst), .parquet, "
                    ".txt, or a folder of these", local=True)
    weight: float = key(1.0, "share of the mixture's tokens, relative to the other sources' weights", gt=0)
    text_field: str = key("text",
                          "field of a record that holds the text; only read where the path is not tokenized yet")
    split: str = key("train", "split of the dataset used for training")


class DataConfig(Section):
    """The training data. A bare value is `synthetic`, or the path of a single source."""

    kind: Literal["mixture", "synthetic"] = key("mixture", "synthetic: random tokens, no files needed")
    sources: dict[str, SourceConfig] = key({}, "name -> source; names appear in metrics and the report")
    tokenizer: str | None = key(None,
                                "tokenizer for text sources (.model or tokenizer.json); dataset "
                                "directories contain their own", local=True)
    cache_dir: str = key("data_cache", "cache for tokenized text sources, and for downloaded shards of sources on gs://", changeable=True, local=True)
    cache_gb: float = key(200.0, "GB (1e9 bytes) that downloaded shards may use on each machine's disk", gt=0, changeable=True, local=True)
    isolate_documents: bool = key(True, "attention and positions stop at document ends; CT-LLM trained with this off")
    mask_eod: bool = key(True, "no loss where the input is the end of a document (Megatron's --eod-mask-loss)")
    damaged_budget: int = key(10, "number of unreadable records that a whole run replaces by others before it stops", ge=0, changeable=True)
    workers: int = key(0, "loader processes; 0 loads with threads of the trainer", ge=0, changeable=True, local=True)
    threads: int = key(2, "loader threads in each process", ge=1, changeable=True, local=True)
    prefetch: int = key(4, "batches made ahead", ge=1, changeable=True, local=True)

    @classmethod
    def from_shorthand(cls, value: str) -> dict:
        """`synthetic`, or a path."""
        if value == "synthetic":
            return {"kind": "synthetic"}
        return {"kind": "mixture", "sources": {"data": {"path": value}}}

    @model_validator(mode="after")
    def _check(self):
        if self.kind == "mixture" and not self.sources:
            raise ValueError("kind=mixture needs at least one entry in sources; data=DIR gives one, data=synthetic "
                             "needs none")
        return self


class TokenizerTrainConfig(Section):
    """`launch.py tokenizer`: train a SentencePiece BPE model with the options of Baichuan2's."""

    input: list[str] = key(..., "text to train on: files or folders (JSONL, .gz, .zst, Parquet, plain)")
    output: str = key(..., "path of the model to write, ending in .model")
    vocab_size: int = key(..., "number of pieces, including special and byte pieces", ge=300)
    links: Links = key("follow", "follow: links below a folder of the input are read, each folder once; skip: they are "
                                 "left out, for input that you do not trust")
    text_field: str = key("text", "field of a record that holds the text")
    character_coverage: float = key(0.9995,
                                    "share of characters that get a piece; the rest falls back to bytes", gt=0.9, le=1)
    max_sentences: int = key(2_000_000, "at most this many lines are sampled for training", ge=1)
    seed: int = key(42, "seed of that sampling")
    max_bad: int = key(0,
                       "bad records (malformed JSON, invalid UTF-8, no text) set aside before the command fails", ge=0)


class BuildConfig(Section):
    """Convert text directly to a dataset directory in one process, as for a text source of a training run."""

    input: list[str] = key(..., "text to prepare: files or folders (JSONL, .gz, .zst, Parquet, plain)")
    output: str = key(..., "dataset directory to write")
    tokenizer: str = key(..., "tokenizer: a SentencePiece .model or a tokenizer.json")
    name: str = key("text", "name of the dataset, in its file names", pattern=r"^[a-z][a-z0-9_]*$")
    text_field: str = key("text", "field of a record that holds the text")
    eod_id: int | None = key(None, "id that ends each document; null: the tokenizer's EOS", ge=0)
    record_tokens: int = key(4096, "tokens in a record (R); a training sequence divides or multiplies it", ge=16)
    shards: int = key(1, "shards of the training split", ge=1)
    validation_fraction: float = key(0.01,
                                     "share of the documents held out, chosen by a hash of their text", ge=0, lt=1)
    deduplicate: bool = key(True, "drop exact duplicates of a document before the split")
    seed: int = key(42, "seed of the document shuffle")
    max_bad: int = key(0,
                       "bad records (malformed JSON, invalid UTF-8, no text) set aside before the command fails", ge=0)
