"""Comparison of runs: their training data, and their results on held-out data, per group.

A group collects sources of dialogues or pairs (`data.sources.NAME.group`); for text, every source is its own group. The
start record of a run has the counts of its groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ctllm_jax.report.readable import finite, percent
from ctllm_jax.report.run import Run

_BY = {"bits_per_byte": "bytes", "loss": "tokens"}
"""The unit that a figure of text is a mean over; figures of pairs are means over pairs."""


class Figure(NamedTuple):
    """A held-out figure that runs are compared by.

    Attributes:
      key, group: as in an evaluation; no group: all that is held out.
      name: for people.
      spell: a value in words.
      best: min or max.
    """

    key: str
    group: str
    name: str
    spell: Callable[[float], str]
    best: Callable[..., float]


def compares_answers(run: Run) -> bool:
    """Whether a run learns from pairs."""
    return any("rewards/margins" in record for record in (run.train[-1:] or run.evaluation[-1:]))


def groups_of_sources(run: Run) -> dict[str, str]:
    """The group of each source of a run that records it."""
    return {name: str(figures.get("group", name)) for name, figures in _told(run, "sources").items()}


def trained_on(run: Run) -> dict[str, dict[str, float]]:
    """For each group `rows` (dialogues or pairs) and `tokens` of one epoch, of text the `tokens` of the whole run."""
    found = {}
    for name, figures in _told(run, "groups").items():
        counts = {"rows": finite(figures.get("rows", figures.get("pairs"))), "tokens": finite(figures.get("tokens"))}
        found[name] = {key: value for key, value in counts.items() if value is not None}
    if not found and isinstance(tokens := run.start.get("tokens_per_source"), dict):
        found = {str(name): {"tokens": value} for name, each in tokens.items() if (value := finite(each)) is not None}
    return found


def held_out(run: Run, record: dict | None = None) -> dict[str, dict[str, float]]:
    """Held-out figures by group, of an evaluation record (None: the last). Under "", those of all pairs together."""
    if record is None:
        record = run.evaluation[-1] if run.evaluation else {"sources": {}}
    groups = groups_of_sources(run)
    members: dict[str, list[dict]] = {}
    for source, figures in record["sources"].items():
        members.setdefault(groups.get(source, source), []).append(figures)
    found = {group: _together(each) for group, each in members.items()}
    if "rewards/margins" in record:
        found[""] = _together([record])
    return found


def _together(members: Sequence[dict]) -> dict[str, float]:
    """Figures of several sources as one: counts are added, all other figures are weighted means."""
    known = [{key: value for key, each in figures.items() if (value := finite(each)) is not None}
             for figures in members]
    total: dict[str, float] = {}
    for key in dict.fromkeys(key for figures in known for key in figures):
        if key in ("tokens", "bytes", "pairs"):
            total[key] = sum(figures.get(key, 0.0) for figures in known)
            continue
        over = "pairs" if any("pairs" in figures for figures in known) else _BY.get(key)
        parts = [(figures[key], figures.get(over, 1.0)) for figures in known if key in figures]
        weight = sum(count for _, count in parts)
        if weight:
            total[key] = sum(value * count for value, count in parts) / weight
    return total


def figures_of(runs: Sequence[Run]) -> list[Figure]:
    """The figures that these runs can be compared by, in the order in which they are shown."""
    reached = [held_out(run) for run in runs]
    groups = list(dict.fromkeys(group for each in reached for group in each if group))
    if any(compares_answers(run) for run in runs):
        shown = [("rewards/accuracies", "accuracy", percent, max), ("rewards/margins", "margin", "{:.3f}".format, max)]
        found = [Figure("loss", "", "loss", "{:.4f}".format, min)]
        groups = ["", *(groups if len(groups) > 1 else [])]
    else:
        shown = [("bits_per_byte", "bits a byte", "{:.3f}".format, min), ("loss", "loss", "{:.3f}".format, min)]
        found = []
    found += [Figure(key, group, name, spell, best) for group in groups for key, name, spell, best in shown]
    return [figure for figure in found if any(figure.key in each.get(figure.group, {}) for each in reached)]


def best_value(figure: Figure, reached: Sequence[dict[str, dict[str, float]]]) -> float | None:
    """The best of the runs' values; None if there is nothing to compare."""
    values = [value for each in reached if (value := each.get(figure.group, {}).get(figure.key)) is not None]
    return figure.best(values) if len(values) > 1 and min(values) < max(values) else None


def unit(runs: Sequence[Run]) -> str:
    """The names of the rows of `trained_on`."""
    return "pairs" if any(compares_answers(run) for run in runs) else "dialogues"


def unequal_held_out(runs: Sequence[Run]) -> list[str]:
    """Sources of which runs evaluate on different held-out data, or some on none: their figures are not comparable."""
    said: dict[str, set] = {}
    counted: dict[str, set] = {}
    for run in runs:
        if run.evaluation:
            for name, figures in _told(run, "sources").items():
                said.setdefault(name, set()).add(figures.get("held_out_sha256"))
            for name, figures in run.evaluation[-1]["sources"].items():
                counted.setdefault(name, set()).add(figures.get("pairs", figures.get("tokens")))
    evaluated = [run for run in runs if run.evaluation]
    absent = {name for name in counted if any(name not in run.evaluation[-1]["sources"] for run in evaluated)}
    differing = {name for found in (said, counted) for name, values in found.items() if len(values) > 1}
    return sorted(absent | differing)


def _told(run: Run, part: str) -> dict[str, dict]:
    data = run.start.get("data")
    found = data.get(part) if isinstance(data, dict) else None
    return {str(name): figures for name, figures in found.items() if isinstance(figures, dict)} \
        if isinstance(found, dict) else {}
