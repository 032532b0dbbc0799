"""`launch.py prepare`: raw text to a corpus, and to dataset directories."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from ctllm_jax.cli.progress import stage_bars
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.prepare import PrepareConfig

if TYPE_CHECKING:
    from ctllm_jax.cli import Context

SCHEMA = PrepareConfig
TAKES_CONFIG = True
CONFIG_IS_OPTIONAL = True
OPTIONS = {"--estimate": "hours and disk of the whole input, from a sample of it"}
USAGE = """
usage: python launch.py prepare [CONFIG] input=TEXT output=DIR [tokenizer=TOKENIZER] [key=value …]
                                [--dry-run | --estimate]

The command reads raw text (JSONL, .gz, .zst, Parquet, plain text, WET, WARC; files or folders of these), filters it by
rules, drops exact duplicates, near-duplicates and similar lines, and writes clean text below DIR/clean. With a
tokenizer, it also holds out, shuffles, tokenizes and packs documents into a dataset directory DIR/NAME for each source.
DIR/report.html shows the counts of documents. The same command continues after Ctrl-C, and repeats only stages that a
changed key affects.

  python launch.py prepare input=crawl/ output=data/crawl limit=1000
  python launch.py prepare input=corpus/ tokenizer=tokenizer.model output=data/corpus rules=light
  python launch.py prepare configs/data/map_cc.yaml output=data/map_cc --estimate
  python launch.py prepare explain=page.txt rules=web

What cannot be read is listed in DIR/quarantine.jsonl.
"""
_SHOWN = 60
_REASONS = 8


def run(context: Context) -> int:
    """Explain, plan, estimate or run."""
    config, console = context.config, context.console
    if config.explain:
        return explain(config, console)
    from data_prep.pipeline import plan

    inputs = plan(config)
    show_inputs(inputs, console)
    if context.dry_run:
        rules = ", ".join(sorted(_rules(config, inputs)))
        console.print(f"would be prepared into {escape(config.output)}: rules {rules}; "
                      f"{'clean text only' if config.tokenizer is None else 'clean text and datasets'}")
        return 0
    if "--estimate" in context.options:
        return estimate(config, inputs, console)
    return prepare(context, inputs)


def prepare(context: Context, inputs: list) -> int:
    """Run the stages, write the report, and print the counts of documents."""
    from data_prep.pipeline import prepare as run_stages
    from data_prep.report import state, write_report

    config, console = context.config, context.console
    began = time.monotonic()
    with stage_bars(console) as progress:
        ran = run_stages(config, inputs=inputs, progress=progress)
    page = Path(config.output) / "report.html"
    numbers = page.with_suffix(".json")
    report = json.loads(numbers.read_bytes()) if numbers.exists() and page.exists() and not ran.worked else {}
    if report.get("state") != state(config, ran):
        report = write_report(config, ran, command=context.command_line)
    else:
        console.print("[dim]nothing to do: all of it is there already[/]")
    show_funnel(report, console)
    if report["datasets"]:
        show_datasets(report, console)
    rules = ", ".join(dict.fromkeys(row["name"] for row in report["rule_sets"]))
    bad = sum(row["quarantined"] for row in report["funnel"])
    aside = f"; {bad:,} record{'s' * (bad > 1)} set aside: {page.with_name('quarantine.jsonl')}" if bad else ""
    console.print(escape(f"{time.monotonic() - began:.1f} s; rules: {rules}; report: {page}{aside}"))
    several = f"/{next(iter(ran.manifests), '')}" if len(ran.manifests) > 1 else ""
    words = (["python", "launch.py", "data", "inspect", config.output + several] if ran.manifests else
             ["python", "launch.py", "tokenizer", f"input={config.output}/clean", "output=tokenizer.model",
              "vocab_size=32000"] if config.tokenizer is None else ["less", str(page)])
    console.print(f"next: [bold]{escape(shlex.join(words))}[/]")
    return 0


def show_inputs(inputs: list, console) -> None:
    """The detected formats: two lines per file, the second with the beginning of its first record."""
    from data_prep.readers import describe

    rows = describe(inputs)
    for row in rows[:_SHOWN]:
        kind = row["kind"] + (f".{row['compression']}" if row["compression"] else "")
        facts = [kind, row["encoding"], row["text_field"] and f"text field {row['text_field']}",
                 f"{row['bytes'] / 1e6:,.1f} MB", row["units"] > 1 and f"{row['units']} parts"]
        console.print(f"[bold]{row['source']}[/] {escape(Path(row['file']).name)}: "
                      + escape(", ".join(str(fact) for fact in facts if fact)))
        sample = row["sample"]
        console.print("  [dim]" + (escape(f"{sample['id']} │ {' '.join(sample['text'].split())[:60]}") if sample else
                                   "no record of it can be read") + "[/]")
    if len(rows) > _SHOWN:
        console.print(f"[dim]… and {len(rows) - _SHOWN:,} more files[/]")


def show_funnel(report: dict, console) -> None:
    """Documents and text through the stages."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in ("source", "stage", "in", "kept", "dropped", "bad", "MB kept", "most dropped by"):
        table.add_column(column, justify="left" if column in ("source", "stage", "most dropped by") else "right")
    for row in sorted(report["funnel"], key=lambda row: list(report["removed"]).index(row["source"])
                      if row["source"] in report["removed"] else -1):
        rules = sorted((rule for rule in report["rules"] if rule["source"] == row["source"] and rule["failed"]
                        and row["stage"] == "filter"), key=lambda rule: -rule["failed"])
        why = ", ".join(f"{rule['name']} {rule['failed']:,}" for rule in rules[:3])
        table.add_row(row["source"], row["stage"], f"{row['in']:,}", f"{row['kept']:,}", f"{row['dropped']:,}",
                      f"{row['quarantined']:,}", f"{row['kept_bytes'] / 1e6:,.2f}", why)
    console.print(table)
    if report["left_out"]:
        counts = sorted(report["left_out"].items(), key=lambda item: -item[1])
        more = f" and {len(counts) - _REASONS} more reasons, in the report" if len(counts) > _REASONS else ""
        console.print("left out of the input: " + escape(", ".join(f"{name} ({count:,})" for name, count in
                                                                  counts[:_REASONS]) + more))


def show_datasets(report: dict, console) -> None:
    """The splits of each dataset directory."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in ("dataset", "split", "documents", "tokens", "text MB", "bytes/token", "shards"):
        table.add_column(column, justify="left" if column in ("dataset", "split") else "right")
    for row in report["datasets"]:
        table.add_row(escape(f"{report['output']}/{row['source']}"), row["split"], f"{row['documents']:,}",
                      f"{row['tokens']:,}", f"{row['text_bytes'] / 1e6:,.1f}",
                      f"{row['text_bytes'] / max(1, row['tokens']):.2f}", f"{row['shards']:,}")
    console.print(table)


def estimate(config: PrepareConfig, inputs: list, console) -> int:
    """Time a sample, and print hours and disk for the whole."""
    from ctllm_jax.report.readable import duration
    from data_prep.estimate import estimate as measure

    with stage_bars(console) as progress:
        found = measure(config, inputs, progress)
    table = Table("stage", "CPU time", "input MB/s a core", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for stage, seconds in found.stages.items():
        table.add_row(stage, duration(seconds), f"{found.total_bytes / 1e6 / max(seconds, 1e-9):,.1f}")
    console.print(table)
    console.print(f"from {found.sample_bytes / 1e6:,.1f} of {found.total_bytes / 1e6:,.1f} MB: about "
                  f"{duration(found.hours * 3600)} with {found.workers} workers, {found.disk_bytes / 1e9:,.2f} GB of "
                  "disk")
    tokens = f", {found.tokens / 1e9:,.3f} B tokens" if found.tokens else ""
    console.print(f"kept: about {found.documents:,.0f} documents, {found.clean_bytes / 1e9:,.3f} GB of clean text"
                  f"{tokens} (before copies across the whole are found)")
    return 0


def explain(config: PrepareConfig, console) -> int:
    """Every rule's value for one text."""
    from data_prep.pipeline import rule_set_name
    from data_prep.rules import Filter
    from data_prep.rules import explain as rows_of

    path = Path(config.explain)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"explain={config.explain}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"explain={config.explain}: invalid UTF-8 at byte {error.start}") from None
    chosen = {name: (rule_set_name(source.rules, "wet"), source.languages)
              for name, source in config.all_sources().items()}
    for name, (rules, languages) in chosen.items():
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1),
                      title=escape(f"{path.name}: {len(text):,} characters, rule set {rules}"
                                   + (f" of source {name}" if config.sources else "")),
                      title_justify="left", title_style="bold")
        for column in ("rule", "", "value", "kept if", "", "what it is"):
            table.add_column(column, justify="right" if column == "value" else "left", overflow="fold")
        chosen_rules = Filter(rules, config.filter, languages)
        strict = {rule for rule, bounds in chosen_rules.rule_set.bounds.items() if bounds.above}
        for rule, code, value, low, high, kept, doc in rows_of(text, None, chosen_rules):
            table.add_row(rule, code, f"{value:,.4g}", _range(low, high, strict=rule in strict),
                          "[green]kept[/]" if kept else "[bold red]dropped[/]",
                          escape(doc.split("\n\n")[0].replace("\n", " ")))
        console.print(table)
    return 0


def _range(low: float, high: float, *, strict: bool) -> str:
    shown = [f"{'>' if strict else '≥'} {low:g}" if low != float("-inf") else "",
             f"≤ {high:g}" if high != float("inf") else ""]
    return ", ".join(filter(None, shown)) or "any"


def _rules(config: PrepareConfig, inputs: list) -> set[str]:
    from data_prep.pipeline import rule_set_name

    sources = config.all_sources()
    return {rule_set_name(sources[unit["source"]].rules, unit["kind"]) for unit in inputs}
