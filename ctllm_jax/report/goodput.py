"""A run's wall time over all attempts by part; each second belongs to one part, so the parts sum to the total.

An attempt writes its seconds by phase now and then ("goodput" events), cumulative since its process began. Seconds of
steps count as training, unless the step was made again after a restart, was given up by a rollback, or skipped. What a
killed attempt did after its last such event is taken from the times of its other lines, and counts as steps. The time
between two attempts is no part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ctllm_jax.report import tables
from ctllm_jax.report.readable import duration, finite, percent
from ctllm_jax.report.run import Run

PARTS = {"training": "steps that count", "data_wait": "waiting for data", "init": "start, weights and data opened",
         "compile": "compilation", "checkpoint": "saving, as far as training waited for it",
         "evaluation": "held-out evaluation", "sample": "samples", "hooks": "traces and other hooks",
         "rollback": "going back to a checkpoint", "skipped": "steps whose update was skipped",
         "rolled_back": "steps given up by a rollback", "restarts": "steps made again after a restart"}
"""Name -> description, in display order. Only `training` is goodput."""


@dataclass
class Goodput:
    """Seconds by part of PARTS, and of the gaps between attempts, which are in no part."""

    parts: dict[str, float] = field(default_factory=dict)
    between: float = 0.0
    attempts: int = 0

    @property
    def total(self) -> float:
        """Wall time of all attempts."""
        return sum(self.parts.values())

    @property
    def share(self) -> float:
        """Goodput: the share of the wall time that went into steps that count."""
        return self.parts["training"] / self.total if self.total else 0.0


@dataclass
class _Piece:
    """Some steps in a row: (first, last], the seconds they took, and how many of them were skipped."""

    first: int
    last: int
    seconds: float
    skipped: int

    def before(self, step: int) -> _Piece:
        """The part up to `step`."""
        share = (step - self.first) / (self.last - self.first)
        return _Piece(self.first, step, self.seconds * share, min(round(self.skipped * share), step - self.first))


def add_up(run: Run) -> Goodput | None:
    """The time of a run by phase; None if its metrics do not record it."""
    if not any(record["event"] == "goodput" for record in run.ledger):
        return None
    return _Sum().of(run.ledger)


class _Sum:
    """A pass over the ledger's records."""

    def __init__(self) -> None:
        self.result = Goodput(dict.fromkeys(PARTS, 0.0))
        self.pieces: list[_Piece] = []
        self.told: dict | None = None
        self.ended: float | None = None

    def of(self, records: list[dict]) -> Goodput:
        for record in records:
            getattr(self, f"_{record['event']}")(record)
        for piece in self.pieces:
            skipped = piece.seconds * piece.skipped / (piece.last - piece.first)
            self.result.parts["skipped"] += skipped
            self.result.parts["training"] += piece.seconds - skipped
        return self.result

    def _start(self, record: dict) -> None:
        self.result.attempts += 1
        self._give_up(record["step"], "restarts")
        self.told = None

    def _rollback(self, record: dict) -> None:
        self._give_up(record["to"], "rolled_back")
        if self.told is not None:
            self.told = {**self.told, "step": record["to"]}

    def _goodput(self, record: dict) -> None:
        seconds = {name: value for name, value in (record.get("seconds") or {}).items() if finite(value) is not None}
        before = self.told or {"step": record["step"], "seconds": {}, "skipped": record.get("skipped", 0)}
        if self.told is None and self.ended is not None:
            # The first line of an attempt states how long before it the attempt began.
            self.result.between += max(0.0, record["time"] - sum(seconds.values()) - self.ended)
        for name, value in seconds.items():
            spent = value - before["seconds"].get(name, 0.0)
            if name == "step":
                self._steps(before["step"], record["step"], spent, record.get("skipped", 0) - before["skipped"])
            else:
                self.result.parts[name if name in PARTS else "hooks"] += spent
        self.told = {"step": record["step"], "seconds": seconds, "skipped": record.get("skipped", 0),
                     "time": record["time"]}

    def _close(self, record: dict) -> None:
        if self.told is not None:
            self._steps(self.told["step"], max(record["step"], self.told["step"]),
                        max(0.0, record["time"] - self.told["time"]), 0)
        self.ended = record["time"]

    def _steps(self, first: int, last: int, seconds: float, skipped: int) -> None:
        if last > first:
            self.pieces.append(_Piece(first, last, seconds, max(0, min(skipped, last - first))))
        elif self.pieces:
            self.pieces[-1].seconds += seconds
        else:
            self.result.parts["hooks"] += seconds

    def _give_up(self, step: int, part: str) -> None:
        while self.pieces and self.pieces[-1].last > step:
            piece = self.pieces.pop()
            kept = piece.before(step) if piece.first < step else None
            self.result.parts[part] += piece.seconds - (kept.seconds if kept else 0.0)
            if kept:
                self.pieces.append(kept)


def goodput_line(run: Run) -> str:
    """`goodput 93.1 % of 2 h 3 min: checkpoint 3.2 %, …`; empty if unknown."""
    found = add_up(run)
    if found is None or not found.total:
        return ""
    lost = sorted(((seconds, name) for name, seconds in found.parts.items() if name != "training"), reverse=True)
    rest = ", ".join(f"{_words(name)} {percent(seconds / found.total)}" for seconds, name in lost
                     if seconds >= 5e-4 * found.total)
    between = f"; {duration(found.between)} between {found.attempts} attempts" if found.between >= 1 else ""
    return f"goodput {percent(found.share)} of {duration(found.total)}: {rest}{between}"


def section(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Bars of the time by phase, one per run, with a table; empty if no run records it."""
    found = {index: goodput for index, run in enumerate(runs) if (goodput := add_up(run)) is not None and goodput.total}
    if not found:
        return ""
    used = [name for name in PARTS if any(goodput.parts[name] > 0 for goodput in found.values())]
    bars = []
    for index, goodput in found.items():
        title = f"<h3>{tables.shown(names[index])}</h3>" if len(runs) > 1 else ""
        shares = {name: goodput.parts[name] / goodput.total for name in used if goodput.parts[name] > 0}
        parts = "".join(f'<i class="c{used.index(name) % 8}" style="flex-grow:{share:.6f}"'
                        f' title="{_words(name)} {percent(share)}"></i>' for name, share in shares.items())
        bars.append(f'{title}<div class="spent">{parts}</div>')
    rows = [[f'<i class="swatch c{used.index(name) % 8}"></i>{_words(name)} <small>{PARTS[name]}</small>',
             *(f"{duration(goodput.parts[name])} <small>{percent(goodput.parts[name] / goodput.total)}</small>"
               for goodput in found.values())] for name in used]
    rows.append(["all attempts", *(duration(goodput.total) for goodput in found.values())])
    if any(goodput.between >= 1 for goodput in found.values()):
        rows.append(["between attempts <small>in no part</small>",
                     *(f"{duration(goodput.between)} <small>{goodput.attempts} attempts</small>"
                       for goodput in found.values())])
    head = ["", *(tables.shown(names[index]) if len(runs) > 1 else "time" for index in found)]
    note = "goodput " + ", ".join(percent(goodput.share) for goodput in found.values())
    return tables.section("Where the time went", "".join(bars) + tables.table(head, rows, "figures"), note)


def _words(name: str) -> str:
    return name.replace("_", " ")
