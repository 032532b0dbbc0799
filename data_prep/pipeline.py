"""`launch.py prepare`: read, filter, drop duplicates, clean, tokenize, pack; each stage resumes where it stopped."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.prepare import PrepareConfig
from ctllm_jax.dataset.manifest import Manifest
from ctllm_jax.dataset.staging import exclusive
from data_prep import duplicates, tokenize
from data_prep.commits import Commit, Stage, Unit, fingerprint, open_stage, write_atomically
from data_prep.engine import Engine, Part, UnitFailed, describe
from data_prep.readers import InputUnit, plan_files
from data_prep.rules import RULES, SETS, RuleSet, bad_words, language, with_thresholds
from data_prep.stages import clean, filter, near, read
from data_prep.stages.common import content_hash, options_of, packages, part_units

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with the stage, its progress, and its total."""
Done = list[tuple[Unit, Commit]]


@dataclass
class Ran:
    """Results of the stages: commits in plan order, and their time in this run."""

    inputs: list[InputUnit]
    stages: dict[str, Done] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    workers: int = 1
    worked: bool = False
    copies: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    manifests: dict[str, Manifest] = field(default_factory=dict)


def plan(config: PrepareConfig) -> list[InputUnit]:
    """The units of reading, of all sources. UserError where an input is missing or not to be recognised."""
    packages()
    return [unit for name, source in config.all_sources().items() for unit in plan_files(name, source, config)]


def prepare(config: PrepareConfig, *, inputs: Sequence[InputUnit] | None = None,
            progress: Progress = lambda stage, done, total: None) -> Ran:
    """Run every stage of `config` that has not been run, into `config.output`.

    Raises:
      UserError: more than `max_bad` records are bad, units failed, or nothing is left; what was done stays done.
    """
    inputs = list(plan(config) if inputs is None else inputs)
    for cached in (tokenize.load, clean.evaluation_text, filter.make_filter, bad_words.load_files,
                   language.load):
        cached.cache_clear()  # They know files by name, and a run before in this process may have seen others there.
    known = tokenize.vocabulary(config) if config.tokenizer else None
    output = Path(config.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise UserError(f"output={config.output} cannot be written: {error.strerror}") from None
    for path in sorted((output / "clean").rglob("*")):
        if path.is_file() and not path.name.endswith((".jsonl.zst", ".tmp")):
            raise UserError(f"{path} is in the way: what prepare did not write in {output / 'clean'} would be removed")
    try:
        with exclusive(output / "stages"):
            pipeline = Pipeline(config, inputs, progress)
            pipeline.run(known)
    except OSError as error:
        raise UserError(describe(error)) from error
    return pipeline.ran


class Pipeline:
    """One run of the stages over one output directory."""

    def __init__(self, config: PrepareConfig, inputs: list[InputUnit], progress: Progress):
        self.config, self.progress = config, progress
        self.output = Path(config.output).absolute()
        self.sources = config.all_sources()
        self.engine = Engine(kind=config.engine, address=config.ray.address, workers=config.workers)
        self.ran = Ran(inputs, workers=self.engine.workers)

    def run(self, known: tokenize.Vocabulary | None) -> None:
        """All stages, in order."""
        config = self.config
        self.read()
        documents = self.filter()
        parts = [Part(Path(unit["location"]), self.sources[unit["source"]].priority) for unit in documents]
        dropped: list[list[int]] = [[] for _ in parts]
        if config.deduplicate and parts:
            dropped = self.exact(documents, parts)
        if config.minhash.enabled and parts:
            dropped = self.near(documents, parts, dropped)
        cleaned = self.clean(documents, dropped)
        if known is not None:
            self.tokenize(cleaned, known)

    def read(self) -> None:
        """Input files to parts of records; bad records stop the run here, after all files are read."""
        config = self.config
        stage = self.stage("read", *_read_options(config))
        units = [_read_unit(unit) for unit in self.ran.inputs]
        options = options_of(config, stage)
        if config.limit is None:
            done = self.units("read", stage, read.run, units, options, sizes=[unit["size"] for unit in units])
        else:
            done = self.limited(stage, units, options)
        bad = [commit.counters for _, commit in done if commit.counters["quarantined"]]
        count = sum(counters["quarantined"] for counters in bad)
        listed = self.output / "quarantine.jsonl"
        if bad:
            write_atomically(listed, "".join((stage.parts / name).read_text(encoding="utf-8") for _, commit in done
                                             for name in commit.files if name.endswith(".quarantine.jsonl")))
        else:
            listed.unlink(missing_ok=True)
        if count > config.max_bad:
            raise UserError(f"{bad[0]['first_bad']}. Bad records: {count}, allowed: max_bad={config.max_bad}; they are "
                            f"listed in {listed}. {_advice(bad[0]['first_bad'])}What is good has been read: the same "
                            f"command with a higher max_bad continues")
        if not any(commit.counters["records"] for _, commit in done):
            raise UserError(f"the input holds no text: {count} bad records, and no other")

    def limited(self, stage: Stage, units: list[Unit], options: dict[str, Any]) -> Done:
        """The first `limit` records of each source: unit by unit, until there are enough."""
        done: Done = []
        for source in self.sources:
            left = self.config.limit
            for unit in units:
                if unit["source"] == source and left > 0:
                    limited = {**unit, "limit": left}
                    done += self.units("read", stage, read.run, [limited], options, sizes=[unit["size"]], keep=True)
                    left -= done[-1][1].counters["records"]
        stage.clean([unit for unit, _ in done])
        self.ran.stages["read"] = done
        return done

    def filter(self) -> list[Unit]:
        """Parts of records to parts of documents; a unit for each that holds any."""
        config = self.config.filter
        files = [content_hash(path) for path in (*config.url_blacklists, *config.bad_words, config.language_model)]
        done_before = self.ran.stages["read"]
        read_stage = self.stage("read", *_read_options(self.config))
        kinds = {unit["id"]: unit["kind"] for unit in self.ran.inputs}
        sets = with_thresholds(SETS, config.thresholds)
        used = {rule_set_name(self.sources[unit["source"]].rules, unit["kind"]) for unit in self.ran.inputs}
        for name in config.thresholds.keys() - used:
            logger.warning("filter.thresholds.%s changes nothing: no source has that rule set (in use: %s)", name,
                           ", ".join(sorted(used)))
        units = []
        for unit, commit in done_before:
            source = self.sources[unit["source"]]
            rules = rule_set_name(source.rules, kinds[unit["id"]])
            units += part_units([(unit, commit)], read_stage, rules=rules, languages=source.languages,
                                set=_set_identity(sets[rules]))
        stage = self.stage("filter", filter.VERSION, config.model_dump(mode="json", exclude={"thresholds"}), files)
        done = self.units("filter", stage, filter.run, units, options_of(self.config, stage))
        if not any(commit.counters["kept"] for _, commit in done):
            failed = sum((Counter(commit.counters["failed"]) for _, commit in done), Counter())
            worst = ", ".join(f"{name} {count:,}" for name, count in failed.most_common(4))
            raise UserError(f"nothing is left: the rules dropped all documents ({worst}). `explain=FILE` shows every "
                            f"rule's value for one text; rules=light is for text that is clean already")
        rules_of = {unit["id"]: unit["rules"] for unit in units}
        return [{**unit, "rules": rules_of[unit["id"]]} for unit in part_units(done, stage)]

    def exact(self, documents: list[Unit], parts: list[Part]) -> list[list[int]]:
        """Rows of each part that are a copy of another document."""
        stage = self.stage("exact", duplicates.VERSION)
        unit = {"id": "copies", "documents": _identity(documents, parts)}
        commit = self.timed("exact", lambda: duplicates.exact(self.engine, stage, unit, parts))
        self.ran.stages["exact"] = [(unit, commit)]
        stage.clean([unit])
        table = duplicates.read_copies(stage)
        self.ran.copies["exact"] = duplicates.winners(self.engine, parts, table, self.config.filter.samples)
        return duplicates.rows_by_part(table["node"].to_numpy(), len(parts))

    def near(self, documents: list[Unit], parts: list[Part], dropped: list[list[int]]) -> list[list[int]]:
        """Rows of each part that are a copy, exact or near, of another document."""
        config = self.config.minhash
        options = config.model_dump(mode="json", exclude={"enabled", "verify", "implementation"})
        stage = self.stage("minhash", near.VERSION, options)
        units = [{**unit, "dropped": rows} for unit, rows in zip(documents, dropped, strict=True)]
        done = self.units("minhash", stage, near.run, units, options_of(self.config, stage))
        with_keys = [(place, stage.parts / name) for place, (_, commit) in enumerate(done) for name in commit.files]
        clusters = self.stage("clusters", duplicates.VERSION)
        identity = [_identity(documents, parts), dropped, [stage.key(unit) for unit, _ in done]]
        bands = [{"id": f"band-{band:02d}", "documents": fingerprint(identity)} for band in range(config.bands)]
        last = {"id": "clusters", "documents": fingerprint(identity), "verify": config.verify}
        # Band keys are numbered by the parts that have any; nodes count all parts.
        key_parts = [Part(path, index=place) for place, path in with_keys]
        commit = self.timed("clusters", lambda: duplicates.near(
            self.engine, clusters, [*bands, last], key_parts, parts, config,
            progress=lambda band: self.progress("clusters", band, config.bands)))
        self.ran.stages["clusters"] = [(last, commit)]
        clusters.clean([*bands, last])
        table = duplicates.read_copies(clusters)
        self.ran.copies["minhash"] = duplicates.winners(self.engine, parts, table, self.config.filter.samples)
        rows = duplicates.rows_by_part(table["node"].to_numpy(), len(parts))
        return [sorted([*before, *more]) for before, more in zip(dropped, rows, strict=True)]

    def clean(self, documents: list[Unit], dropped: list[list[int]]) -> Done:
        """Documents to clean text, below `clean/SOURCE/`."""
        config = self.config
        lines = config.lines.enabled
        sets = with_thresholds(SETS, config.filter.thresholds)
        units = [{**unit, "dropped": rows, "similar_lines": lines and sets[unit["rules"]].similar_lines}
                 for unit, rows in zip(documents, dropped, strict=True)]
        files = [content_hash(path) for path in config.decontaminate.files]
        stage = self.stage("clean", clean.VERSION, config.lines.model_dump(mode="json"),
                           config.decontaminate.model_dump(mode="json", exclude={"files"}), files,
                           config.filter.samples, parts=self.output / "clean")
        return self.units("clean", stage, clean.run, units, options_of(config, stage))

    def tokenize(self, cleaned: Done, known: tokenize.Vocabulary) -> None:
        """Clean text to a dataset directory for each source."""
        config = self.config
        text = self.stage("clean", parts=self.output / "clean")
        stage = self.stage("tokenize", tokenize.VERSION, known, config.seed)
        units = [{"id": Path(name).name.removesuffix(".jsonl.zst"), "source": unit["source"], "key": commit.key,
                  "location": str(text.parts / name)} for unit, commit in cleaned for name in commit.files]
        options = options_of(config, stage, dtype=known.dtype)
        done = self.units("tokenize", stage, tokenize.run, units, options)
        packed = self.stage("pack", tokenize.VERSION, known, config.record_tokens)
        options = options_of(config, packed, dtype=known.dtype, eod_id=known.eod_id, tokenized=str(stage.parts))
        merged = self.merge(done, stage, known)
        shards = []
        for source in self.sources:
            own = [(unit, commit) for unit, commit in done if unit["source"] == source]
            if not own:
                logger.warning("source %s has no documents left: there is no dataset %s", source, self.output / source)
                tokenize.remove(self.output / source)
                continue
            names, content = merged[source]
            shards += tokenize.plan_shards(names, content, config, source)
        made = self.units("pack", packed, tokenize.pack, shards, options)
        for source in dict.fromkeys(unit["source"] for unit, _ in made):
            own = [(unit, commit) for unit, commit in made if unit["source"] == source]
            self.ran.manifests[source] = tokenize.assemble(
                self.output / source, source, own, packed, config, known, self.config_sha256(known))

    def merge(self, tokenized: Done, stage: Stage, known: tokenize.Vocabulary) -> dict[str, tuple[list[Path], str]]:
        """Merge tokenized parts until they can all be open at once: source -> the indexes, and the hash of their
        text."""
        parts = {source: [(unit, commit) for unit, commit in tokenized if unit["source"] == source]
                 for source in self.sources}
        content = {source: fingerprint([commit.key for _, commit in own], self.config.record_tokens)
                   for source, own in parts.items()}
        folders = dict.fromkeys(parts, stage.parts)
        root, made, level = self.output / "stages" / "merge", [], 0
        while todo := [unit for source, own in parts.items()
                       for unit in tokenize.plan_merges(own, folders[source], level)]:
            merging = open_stage(root, tokenize.VERSION, known.dtype)
            done = self.units("merge", merging, tokenize.merge, todo,
                              options_of(self.config, merging, dtype=known.dtype), keep=True)
            for source in {unit["source"] for unit, _ in done}:
                parts[source] = [(unit, commit) for unit, commit in done if unit["source"] == source]
                folders[source] = merging.parts
            made, level = [*made, *done], level + 1
        if made:
            merging.clean([unit for unit, _ in made])
        else:
            shutil.rmtree(root, ignore_errors=True)
        return {source: ([folders[source] / f"{unit['id']}.npy" for unit, _ in own], content[source])
                for source, own in parts.items()}

    def config_sha256(self, known: tokenize.Vocabulary) -> str:
        """Hash of everything except the text that determines a dataset's bytes."""
        schema = type(self.config).model_fields
        free = {name for name, one in schema.items() if (one.json_schema_extra or {}).get("changeable")}
        return fingerprint(self.config.model_dump(mode="json", exclude={*free, "output", "tokenizer"}), known)

    def stage(self, name: str, *options: Any, parts: Path | None = None) -> Stage:
        """The folder of a stage."""
        return open_stage(self.output / "stages" / name, *options, parts=parts)

    def units(self, name: str, stage: Stage, function: Callable, units: list[Unit], options: dict[str, Any], *,
              sizes: list[int] | None = None, keep: bool = False) -> Done:
        """Run the uncommitted ones of these units; returns the commits of all, in the order of the plan."""
        found = [stage.find(unit) for unit in units]
        sizes = sizes or [1] * len(units)
        done = sum(size for size, commit in zip(sizes, found, strict=True) if commit)
        weight = {unit["id"]: size for unit, size in zip(units, sizes, strict=True)}
        todo = [unit for unit, commit in zip(units, found, strict=True) if commit is None]
        failed: list[UnitFailed] = []

        def run() -> None:
            nonlocal done
            for result in self.engine.run(function, todo, options):
                if isinstance(result, UnitFailed):
                    failed.append(result)
                    continue
                done += weight[result["unit"]]
                self.ran.worked = True
                self.progress(name, done, sum(sizes))
                self.ran.cpu_seconds[name] = self.ran.cpu_seconds.get(name, 0) + result["cpu_seconds"]
                self.ran.peak_memory = max(self.ran.peak_memory, result["peak_memory"])

        self.timed(name, run)
        if failed:
            first, listed = failed[0], stage.root / "failed.txt"
            why = first.message.strip()
            if not first.user_error:
                write_atomically(listed, "\n".join(f"{one.unit}:\n{one.message}" for one in failed))
                why = f"{why.splitlines()[-1]} (the traceback is in {listed})"
            raise UserError(f"{len(failed)} of {len(units)} units of the stage {name} failed, the others are done: the "
                            f"same command continues from there. The first ({first.unit}): {why}")
        commits = [commit or stage.find(unit) for unit, commit in zip(units, found, strict=True)]
        if not keep:
            stage.clean(units)
            self.ran.stages[name] = list(zip(units, commits, strict=True))
        return list(zip(units, commits, strict=True))

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        """`work()`, its wall time noted under the stage's name."""
        import time

        began = time.monotonic()
        try:
            return work()
        finally:
            self.ran.seconds[name] = self.ran.seconds.get(name, 0) + time.monotonic() - began


def rule_set_name(rules: str, kind: str) -> str:
    """The rule set of a file: `auto` is web for pages of a crawl, light for anything else."""
    if rules != "auto":
        return rules
    return "web" if kind in ("warc", "wet") else "light"


def _set_identity(rules: RuleSet) -> str:
    """Hash of a rule set."""
    return fingerprint([[name, bounds.low, bounds.high, bounds.above, RULES[name].version]
                        for name, bounds in rules.bounds.items()],
                       rules.link_removal, rules.line_rules, rules.languages, rules.published)


def _advice(reason: str) -> str:
    if "invalid UTF-8" in reason:
        return "If this is text in another encoding, name it: encoding=gb18030 or encoding=big5. "
    return ""


def _read_options(config: PrepareConfig) -> tuple[Any, ...]:
    """Options besides the input that affect reading."""
    return read.VERSION, config.encoding, config.html, config.max_record_mib, config.record_seconds


def _read_unit(unit: InputUnit) -> Unit:
    identity = {name: value for name, value in unit.items() if name not in ("file", "sample")}
    return {**identity, "changed": _changed(unit["file"]), "location": unit}


def _changed(file: str) -> str:
    """A version of an input file, in addition to its size."""
    if "://" not in file:
        return str(os.stat(file).st_mtime_ns)
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(file)
    info = filesystem.info(path)
    return str(next((info[name] for name in ("etag", "ETag", "md5Hash", "mtime", "LastModified") if name in info), ""))


def _identity(documents: list[Unit], parts: list[Part]) -> str:
    return fingerprint([[unit["id"], unit["key"], part.rank] for unit, part in zip(documents, parts, strict=True)])
