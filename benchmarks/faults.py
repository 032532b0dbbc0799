"""Real faults on real processes: what was tried, what was survived, what was lost, and what a user is told.

    python benchmarks/faults.py [--only NAME …] [--rounds 10] [--write-table] [--list]

Each row breaks something on purpose, a tiny run or its files, starts the same command again where it ended, and
compares with a run that nobody disturbed: weights and optimizer bit for bit, losses to 1e-5 where the number of devices
changes. Survived: that was so, and the fault was named. Work made again: the most that one fault cost, by the seconds
of the steps that were made twice. `--rounds` is how often to kill, and (at most ten times) to damage a shard. What this
machine does not allow is "not tried". Exit status 1 if something was not survived.

Rows that ran replace theirs in benchmarks/results/faults.json; --write-table puts all of them into docs/reliability.md.
The processes are on CPUs, whatever else is here.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from data_loading import cpu_name

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "benchmarks" / "results" / "faults.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- faults -->", "<!-- end of faults -->"
PACKAGES = ("jax", "orbax-checkpoint", "grain", "array-record")


def try_fault(name: str, bench: Any) -> dict[str, Any]:
    """One row."""
    from fault_matrix.bench import FAULTS, Lost, NotTried, Outcome

    outcome, began = Outcome(), time.perf_counter()
    try:
        FAULTS[name].run(bench, outcome)
    except NotTried as error:
        outcome.not_tried = str(error)
    except Lost as error:
        outcome.add(str(error))
    finally:
        bench.end()
    return {"fault": name, "what": FAULTS[name].what, **dataclasses.asdict(outcome),
            "took": round(time.perf_counter() - began, 1), "date": time.strftime("%Y-%m-%d")}


def say(row: dict[str, Any]) -> str:
    """A row for a terminal."""
    if row["not_tried"]:
        return f"{row['fault']:15} not tried: {row['not_tried']}"
    text = (f"{row['fault']:15} survived {row['survived']} of {row['tried']}; lost: {row['lost']}; made again:"
            f" {_again(row)}  [{row['took']:.0f} s]\n{'':15} {row['message']}")
    return "\n".join([text, *(f"{'':15} NOT SURVIVED: {problem}" for problem in row["problems"])])


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| fault | tried | survived | data lost | work made again | what a user saw |",
             "|---|---:|---:|---|---|---|"]
    for row in rows:
        cells = ["not tried", "–", row["not_tried"], "–", "–"] if row["not_tried"] else [
            str(row["tried"]), str(row["survived"]), row["lost"] if row["survived"] == row["tried"] else
            "; ".join(row["problems"])[:200], _again(row), f"`{_shortened(row['message'])}`" if row["message"] else "–"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (row["what"], *cells)) + " |")
    return "\n".join(lines)


def _again(row: dict[str, Any]) -> str:
    steps = row["steps_again"]
    return f"{steps} step{'s' * (steps != 1)}, {row['seconds_again']:.2g} s" if steps else "none"


def _shortened(text: str) -> str:
    """What fits a cell: names of files that are hashes keep their beginning."""
    text = re.sub(r"\b([0-9a-f]{6})[0-9a-f]{10,}\b", r"\1…", re.sub(r"\s+", " ", text))
    return text if len(text) <= 200 else text[:197] + " …"


def write_results(path: Path, new: list[dict[str, Any]], *, order: list[str]) -> list[dict[str, Any]]:
    """Put rows that ran in the place of those before; returns all."""
    kept = {row["fault"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    kept |= {row["fault"]: row for row in new}
    rows = [kept[name] for name in order if name in kept]
    columns = {"tried": lambda row: row["tried"], "survived": lambda row: row["survived"],
               "steps made again": lambda row: row["steps_again"],
               "seconds made again": lambda row: row["seconds_again"]}
    figures = {title: {row["what"]: cell(row) for row in rows if not row["not_tried"]}
               for title, cell in columns.items()}
    path.write_text(json.dumps({
        "figures": figures, "rows": rows, "device": f"{cpu_name()}, {os.cpu_count()} cores",
        "python": platform.python_version(), "load_average": os.getloadavg()[0],
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "command": "python benchmarks/faults.py"}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return rows


def write_table(rows: list[dict[str, Any]]) -> None:
    """Put the table between its markers."""
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        raise SystemExit(f"{PAGE} has no lines {BEGIN} and {END}")
    PAGE.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}", encoding="utf-8")


def prepare(scratch: Path) -> None:
    """Import what every process needs, once; compute nothing. The environment is that of all of them."""
    scratch.chmod(0o755)  # for a fault that another user makes
    for name in [name for name in os.environ if name.startswith(("JAX_", "XLA_", "SLURM_"))]:
        del os.environ[name]
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
                   "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT)}
    sys.path.insert(0, str(ROOT))
    for module in ("ctllm_jax.cli.data", "ctllm_jax.cli.pretrain", "ctllm_jax.trainer.trainer", "fault_matrix"):
        importlib.import_module(module)


def main() -> int:
    """Break, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows; --list shows them")
    parser.add_argument("--rounds", type=int, default=10, help="how often to kill (default: 10)")
    parser.add_argument("--list", action="store_true", help="show the rows, and end")
    parser.add_argument("--scratch", type=Path, help="where to make the runs; default: a temporary folder")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--write-table", action="store_true", help="put the table into docs/reliability.md")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and what was begun is ended, and removed
    # No TemporaryDirectory: it would go when the first fork ends.
    scratch = Path(tempfile.mkdtemp(prefix="faults-", dir=arguments.scratch))
    try:
        prepare(scratch)
        from fault_matrix.bench import FAULTS, Bench

        if unknown := [name for name in arguments.only or [] if name not in FAULTS]:
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(FAULTS)}")
        if arguments.list:
            print("\n".join(f"{fault.name:15} {fault.what}" for fault in FAULTS.values()))
            return 0
        new, bench = [], Bench(scratch, rounds=arguments.rounds)
        for name in arguments.only or FAULTS:
            new.append(try_fault(name, bench))
            print(say(new[-1]), flush=True)
            rows = write_results(arguments.output, new, order=list(FAULTS))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if arguments.write_table:
        write_table(rows)
    lost = [row["fault"] for row in new if row["survived"] < row["tried"]]
    tried, survived = (sum(row[part] for row in new) for part in ("tried", "survived"))
    skipped = sum(bool(row["not_tried"]) for row in new)
    print(f"survived {survived} of {tried} faults of {len(new) - skipped} kinds"
          + (f"; {skipped} kinds were not tried" if skipped else "") + (f"; LOST: {', '.join(lost)}" if lost else ""))
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
