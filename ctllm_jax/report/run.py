"""Read a run directory: the content of metrics.jsonl after handling restarts, torn lines and missing files.

metrics.jsonl only grows. A restart writes a "start" line with the step it went on from; the lines of the earlier
attempt beyond that step are superseded, and dropped here. A number that was not finite is `null` in the file, and its
spelling stands beside it under "nonfinite"; a reader sees the key with the value None.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ctllm_jax.config.errors import UserError
from ctllm_jax.report.readable import finite
from ctllm_jax.storage import is_remote, list_names, open_path

METRICS = "metrics.jsonl"
PART = "metrics-{:05}.jsonl"
"""The parts of metrics.jsonl on an object store, numbered from 1."""
CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
SENTIMENT = "sentiment.json"

_STEPPED = ("train", "evaluation", "sample", "benchmarks")
_MAX_PROBLEMS = 20
_FINAL_RECORDS = 50
_PART = re.compile(r"metrics-(\d{5,})\.jsonl")
# Python reads NaN and Infinity, which are no JSON: to None, as the trainer writes them. One decoder for all lines,
# since json.loads makes a new one each time.
_JSON = json.JSONDecoder(parse_constant=lambda name: None)


@dataclass
class Run:
    """One run. The lists hold the records of metrics.jsonl that still count, oldest first.

    `ledger` has the input of `report.goodput`: starts, rollbacks, sums of seconds, and a "close" at each attempt's end.
    """

    directory: Path
    config: dict = field(default_factory=dict)
    config_text: str = ""
    environment: dict = field(default_factory=dict)
    sentiment: dict = field(default_factory=dict)
    starts: list[dict] = field(default_factory=list)
    train: list[dict] = field(default_factory=list)
    evaluation: list[dict] = field(default_factory=list)
    sample: list[dict] = field(default_factory=list)
    benchmarks: list[dict] = field(default_factory=list)
    baselines: dict[str, dict] = field(default_factory=dict)
    stages: list[dict] = field(default_factory=list)
    events: list[dict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    end: dict | None = None
    ledger: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    last_time: float | None = None
    superseded: int = 0

    @property
    def state(self) -> str:
        """`empty`, `unfinished` (it is running, or was killed), or the reason of its end: `done`, `stopped`,
        `preempted`, `interrupted`, `failed`, `diverged`, `hung`, `lost a process`."""
        if self.end is not None:
            return str(self.end.get("reason", "done"))
        return "unfinished" if self.starts or self.train else "empty"

    @property
    def start(self) -> dict:
        """The latest start line, or an empty one."""
        return self.starts[-1] if self.starts else {}

    @property
    def step(self) -> int:
        """The last step that a line speaks of."""
        return max((records[-1]["step"] for records in (self.train, self.evaluation, self.sample) if records),
                   default=0)

    @property
    def sources(self) -> list[str]:
        """Names of the sources evaluated or measured by a baseline, in order of appearance."""
        records = [*self.evaluation[-1:], *self.evaluation[:1], *self.baselines.values()]
        return list(dict.fromkeys(name for record in records for name in record["sources"]))

    @cached_property
    def train_axes(self) -> tuple[list[int], list[float | None]]:
        """Steps and tokens of the training records, which many curves share."""
        return [record["step"] for record in self.train], [self.tokens_at(record) for record in self.train]

    def tokens_at(self, record: dict) -> float | None:
        """Tokens trained at a record: its own count, else its step times the tokens of a step."""
        tokens = record.get("tokens")
        if type(tokens) is int or (tokens := finite(tokens)) is not None:
            return tokens
        per_step = finite(self.start.get("tokens_per_step"))
        return None if per_step is None else record["step"] * per_step


class FinalLoss(NamedTuple):
    """The mean training loss of the last records of a run; a single batch is noisy.

    Attributes:
      value: None where one of them is not finite.
      first, last: steps of the first and the last of these records.
      records: how many there are.
    """

    value: float | None
    first: int
    last: int
    records: int


def final_loss(run: Run) -> FinalLoss | None:
    """The mean over the last tenth of the training records, at least 1 and at most 50; None if there are none."""
    known = [record for record in run.train if "loss" in record]
    if not known:
        return None
    window = known[-max(1, min(_FINAL_RECORDS, len(known) // 10)):]
    values = [finite(record["loss"]) for record in window]
    mean = None if None in values else math.fsum(values) / len(values)
    return FinalLoss(mean, window[0]["step"], window[-1]["step"], len(window))


def read_run(directory: str | Path) -> Run:
    """Read a run directory. Raises UserError if it is not one; repairs what it can, and notes the repairs."""
    directory = open_path(directory)
    if not directory.exists():
        raise UserError(f"{directory}: no such directory; a run directory is needed (it holds {METRICS})")
    if not directory.is_dir():
        raise UserError(f"{directory}: a file; the run directory that holds it is needed")
    if not metrics_files(directory) and not (directory / CONFIG).exists():
        raise UserError(f"{directory}: not a run directory, it has neither {METRICS} nor {CONFIG}")
    run = Run(directory)
    _read_metrics(run)
    for record in run.starts:
        if isinstance(record.get("config"), dict):
            run.config = record["config"]
    run.config_text = _text(run, CONFIG)
    run.environment, run.sentiment = _json(run, ENVIRONMENT), _json(run, SENTIMENT)
    return run


def _text(run: Run, name: str) -> str:
    path = run.directory / name
    if not path.exists():
        return ""
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        run.problems.append(f"{name}: cannot be read ({error.strerror})")
        return ""


def _json(run: Run, name: str) -> dict:
    text = _text(run, name)
    if not text:
        return {}
    try:
        found = _JSON.decode(text)
    except (ValueError, RecursionError):
        run.problems.append(f"{name}: not JSON; left out")
        return {}
    if not isinstance(found, dict):
        run.problems.append(f"{name}: not a JSON object; left out")
        return {}
    return found


def metrics_files(directory: Path) -> list[tuple[int, Path]]:
    """(number, file) of all that make up the metrics of a run: one on a disk (0), parts on an object store."""
    if not is_remote(directory):
        return [(0, directory / METRICS)] if (directory / METRICS).exists() else []
    names = [name for name in list_names(directory) if name == METRICS or _PART.fullmatch(name)]
    # A part copied from a disk comes first.
    return sorted((0 if name == METRICS else int(_PART.fullmatch(name)[1]), directory / name) for name in names)


def _read_metrics(run: Run) -> None:
    parts = metrics_files(run.directory)
    if not parts:
        run.problems.append(f"{METRICS}: not there (yet)")
        return
    lines, number = _Lines(run), 0
    for _, path in parts:
        with path.open("rb") as file:
            for line in file:
                number += 1
                if line.strip():
                    _take(lines, number, line)
    lines.finish()


def _take(lines: _Lines, number: int, line: bytes) -> None:
    try:
        record = _JSON.decode(line.decode("utf-8"))
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        lines.take(record)
    except (ValueError, RecursionError) as error:
        torn = not line.endswith(b"\n")
        lines.bad(number, "half-written last line" if torn else _reason(error))


def _reason(error: Exception) -> str:
    return "not JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError) else str(error)


class _Lines:
    """The state of a pass over metrics.jsonl: which attempt we are in, and how long it lasted."""

    def __init__(self, run: Run):
        self.run = run
        self.attempt_began: float | None = None
        self.inherited = dict.fromkeys(_STEPPED, 0)
        self.bad_lines = 0
        self.reached = 0

    def take(self, record: dict) -> None:
        event = record.get("event")
        moment = finite(record.get("time"))
        if moment is None:
            raise ValueError("no time")
        if event in _STEPPED:
            self._stepped(event, record)
        elif event == "start":
            self._start(record, moment)
        elif event == "end":
            self.run.end = record
            self.run.events.append(record)
        elif event == "rollback":
            self._rollback(record)
        elif event == "goodput":
            record["step"] = _step(record)
            self.run.ledger.append(record)
        elif event in ("checkpoint", "warning", "request", "damaged"):
            self.run.events.append(record)
        elif event == "baseline":
            record["sources"] = _sources(record)
            self.run.baselines[str(record.get("name", "baseline"))] = record
        elif event == "stage":
            self.run.stages.append(record)
        else:
            raise ValueError(f"unknown event {event!r}")
        if self.attempt_began is None:
            self.attempt_began = moment
        self.run.last_time = moment

    def _start(self, record: dict, moment: float) -> None:
        self._supersede(_step(record))
        self._close_attempt()
        self.attempt_began = moment
        self.run.end = None
        self.run.starts.append(record)
        self.run.events.append(record)
        self.run.ledger.append(record)
        self.reached = record["step"]

    def _rollback(self, record: dict) -> None:
        if type(record.get("to")) is not int or type(record.get("step")) is not int:
            raise ValueError("a rollback record without its steps")
        self._supersede(record["to"])
        self.reached = record["to"]
        self.run.events.append(record)
        self.run.ledger.append(record)

    def _supersede(self, step: int) -> None:
        """Drop records of steps after this one, which are repeated."""
        for kind in _STEPPED:
            records = getattr(self.run, kind)
            while records and records[-1]["step"] > step:
                records.pop()
                self.run.superseded += 1
            self.inherited[kind] = len(records)

    def _stepped(self, kind: str, record: dict) -> None:
        step = _step(record)
        records = getattr(self.run, kind)
        if kind == "evaluation":
            record["sources"] = _sources(record)
        if kind == "benchmarks" and not isinstance(record.get("tasks"), dict):
            raise ValueError("no tasks")
        # An attempt may repeat records of the step it resumed at; the later record counts.
        while 0 < len(records) <= self.inherited[kind] and records[-1]["step"] >= step:
            records.pop()
            self.inherited[kind] -= 1
            self.run.superseded += 1
        if records and records[-1]["step"] > step:
            raise ValueError(f"step {step} after step {records[-1]['step']} without a start line between")
        records.append(record)
        self.reached = max(self.reached, step)

    def _close_attempt(self) -> None:
        if self.attempt_began is not None:
            self.run.seconds += max(0.0, self.run.last_time - self.attempt_began)
            self.run.ledger.append({"event": "close", "time": self.run.last_time, "step": self.reached})

    def bad(self, number: int, why: str) -> None:
        self.bad_lines += 1
        if self.bad_lines <= _MAX_PROBLEMS:
            self.run.problems.append(f"{METRICS}, line {number}: {why}; left out")

    def finish(self) -> None:
        self._close_attempt()
        if self.bad_lines > _MAX_PROBLEMS:
            self.run.problems.append(f"{METRICS}: {self.bad_lines - _MAX_PROBLEMS} more bad lines left out")


def _step(record: dict) -> int:
    step = record.get("step")
    if type(step) is int and step >= 0:
        return step
    if isinstance(step, bool) or not isinstance(step, int | float) or not math.isfinite(step) or step < 0:
        raise ValueError(f"no step (step={step!r})")
    record["step"] = int(step)
    return record["step"]


def _sources(record: dict) -> dict:
    sources = record.get("sources")
    if not isinstance(sources, dict):
        raise ValueError("no sources")
    return {str(name): values for name, values in sources.items() if isinstance(values, dict)}


def flatten(tree: object, prefix: str = "") -> dict[str, object]:
    """A nested mapping as dotted keys; lists and empty mappings are values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree} if prefix else {}
    found = {}
    for name, value in tree.items():
        found.update(flatten(value, f"{prefix}.{name}" if prefix else str(name)))
    return found


_ABSENT = object()


def differences(runs: list[Run]) -> list[tuple[str, list[object | None]]]:
    """Config keys in which the runs differ, each with one value a run (None where absent).

    A run's path does not count as a difference, nor does a run without a recorded config.
    """
    flat = [flatten(run.config) for run in runs]
    keys = {key for config in flat for key in config if key != "run.dir"}
    rows = []
    for key in sorted(keys):
        values = [config.get(key, _ABSENT) for config in flat]
        told = [value for value, config in zip(values, flat, strict=True) if config]
        if any(value is _ABSENT or value != told[0] for value in told):
            rows.append((key, [None if value is _ABSENT else _spelled(value) for value in values]))
    return rows


def _spelled(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def labels(directories: list[Path]) -> list[str]:
    """A short name for each run: the shortest end of its path that distinguishes it from the others."""
    parts = [path.resolve().parts for path in directories]
    for count in range(1, max(len(each) for each in parts) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names
