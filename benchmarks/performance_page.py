"""Write docs/performance.md from benchmarks/results/*.json; with --check only say whether it is up to date.

    python benchmarks/performance_page.py [--check]

A result is one JSON object: `command`, `device`, `versions` and the like tell how it was measured, the rest are its
figures (at the top, or under "figures"): numbers, lists of repeats, and mappings of these, which stand beside each
other as columns. Several such tables, each with a heading, stand under "sections". What is measured stands in the
first line of the script that the command names.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import shlex
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "performance.md"
RESULTS = REPOSITORY / "benchmarks" / "results"

CIRCUMSTANCES = ("name", "command", "device", "python", "versions", "flags", "date", "load_average", "sections")
HEAD = """# Performance

Written by `python benchmarks/performance_page.py` from `benchmarks/results/*.json`: run a benchmark again to change a
figure. Each section gives its command. A list of repeats is shown as median (lowest to highest). All speeds are from
CPUs; those of a GPU or TPU do not exist yet, and what to run for them stands in [log.md](log.md#to-measure-on-a-gpu).
Memory and instruction bundles on a TPU or GPU are what its compiler says.
"""


def render(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of these results, by name of their file."""
    sections = [_section(name, result) for name, result in sorted(results.items())]
    return "\n".join([HEAD, *sections]) if sections else HEAD + "\nNothing has been measured yet.\n"


def read_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Every result of a folder. ValueError where one lacks what a figure needs to be repeated."""
    results = {}
    for path in sorted(folder.glob("*.json")):
        results[path.stem] = result = json.loads(path.read_text(encoding="utf-8"))
        missing = [field for field in ("command", "device", "versions") if not result.get(field)]
        if missing:
            raise ValueError(f"{path}: needs {', '.join(missing)}")
    return results


def _section(name: str, result: Mapping[str, Any]) -> str:
    figures = result.get("figures") or {key: value for key, value in result.items() if key not in CIRCUMSTANCES}
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    python = f"Python {result['python']}, " if result.get("python") else ""
    lines = [f"## {_words(name)}", _purpose(result["command"]), "", "```bash", result["command"],
             "```", f"{result['device']}; {python}{versions}."]
    flags = {flag: value for flag, value in (result.get("flags") or {}).items() if value}
    if flags:
        lines.append("Flags: " + ", ".join(f"`{flag}={value}`" for flag, value in flags.items()) + ".")
    if result.get("date"):
        lines.append(f"Measured on {result['date']}.")
    if result.get("load_average") is not None:
        lines.append(f"Load average at the end: {result['load_average']:.1f} (this benchmark's own threads included).")
    columns = {key: value for key, value in figures.items() if isinstance(value, Mapping)}
    lines += _columns(columns)
    # A median beside its own repeats would say the same twice.
    rest = {key: value for key, value in figures.items()
            if key not in columns and f"{key}_all" not in figures and not _is_raw(value)}
    if rest:
        lines += ["", *_table(["", "figure"], ([_words(key), _shown(key, value)] for key, value in rest.items()))]
    for title, columns in (result.get("sections") or {}).items():
        lines += ["", f"### {_words(title)}", *_columns(columns)]
    return "\n".join(lines) + "\n"


def _is_raw(value: Any) -> bool:
    """Whether an entry is a list of records, which are kept for reading by machine."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _columns(columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Mappings beside each other, a row for each key that one of them has; what a mapping in one holds are rows too."""
    columns = {name: {f"{key}, {inner}" if inner else key: entry for key, value in column.items()
                      for inner, entry in (value.items() if isinstance(value, Mapping) else [("", value)])}
               for name, column in columns.items()}
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    rows = ([_words(key), *(_shown(key, column.get(key)) for column in columns.values())] for key in keys)
    return ["", *_table(["", *map(_words, columns)], rows)] if columns else []


def _purpose(command: str) -> str:
    """The first line of the docstring of the script that a command runs."""
    script = next(REPOSITORY / word for word in shlex.split(command) if word.endswith(".py"))
    return (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] + ["---:"] * (len(head) - 1), *rows)]


def _words(key: str) -> str:
    words = key.removesuffix("_all").replace("_", " ").replace("cpu", "CPU")
    return words[0].upper() + words[1:]


def _shown(key: str, value: Any) -> str:
    if isinstance(value, list):
        return f"{_shown(key, statistics.median(value))} ({_shown(key, min(value))} to {_shown(key, max(value))})"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "–" if value is None else str(value)
    if "seconds" in key and "per" not in key:
        return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) < 1e-3:
        return f"{value:.2g}"
    # Three digits: a benchmark on a machine with other work does not know more.
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page is out of date")
    arguments = parser.parse_args()
    page = render(read_results())
    if arguments.check:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
