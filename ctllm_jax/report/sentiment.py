"""The sentiment section: shares of positive answers, and answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctllm_jax.report.readable import finite, percent
from ctllm_jax.report.run import Run
from ctllm_jax.report.tables import section, shown, table

_SAMPLES = 12
_SHARES = {"different texts": "distinct", "the commonest text": "commonest",
           "different pairs of characters": "distinct_bigrams", "came to an end": "ended",
           "copied from the training reviews": "copied"}


def sentiment(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The section of the runs that have a verdict."""
    parts = []
    for run, name in zip(runs, names, strict=True):
        if not run.sentiment:
            continue
        title = f"<h3>{shown(name)}</h3>" if len(runs) > 1 else ""
        rows = [[shown(cell) for cell in row] for row in figures(run.sentiment)]
        notes = "".join(f"<p>{shown(remark)}</p>" for remark in remarks(run.sentiment))
        parts.append(title + table(["", *map(shown, models(run.sentiment))], rows, "figures") + notes
                     + _samples(run.sentiment))
    return section("Sentiment of what it writes", "".join(parts), "the same prompts and seeds") if parts else ""


def models(verdict: dict[str, Any]) -> list[str]:
    """Names of the models, in the order of the columns."""
    return list(_mapping(verdict.get("figures")))


def figures(verdict: dict[str, Any]) -> list[list[str]]:
    """The rows of the table: a name, and the figure of each model."""
    columns = [_mapping(column) for column in _mapping(verdict.get("figures")).values()]
    rows = [["judged positive", *(share(column.get("positive")) for column in columns)]]
    rows += [[name, *("–" if (value := finite(column.get(key))) is None else percent(value) for column in columns)]
             for name, key in _SHARES.items()]
    means = [finite(column.get("characters")) for column in columns]
    return [*rows, ["characters, mean", *("–" if mean is None else f"{mean:.1f}" for mean in means)]]


def remarks(verdict: dict[str, Any]) -> list[str]:
    """The accuracy of the judge, and the results on held-out pairs."""
    calibration, pairs = _mapping(verdict.get("calibration")), _mapping(verdict.get("held_out_pairs"))
    agreement = _mapping(calibration.get("agreement"))
    return [f"The judge, {verdict.get('judge', '–')}, agrees with the label of {share(agreement)} of"
            f" {agreement.get('count', '–')} held-out reviews. Of the positive ones it calls"
            f" {share(calibration.get('of_positive'))} positive, of the negative ones"
            f" {share(calibration.get('of_negative'))}. It was trained on all of these reviews.",
            f"In {share(pairs)} of {pairs.get('count', '–')} held-out pairs the positive review has the higher implicit"
            " reward."]


def share(value: Any) -> str:
    """A share and its 95 % interval as 86.3% [82.0, 89.8]; a dash if there is none."""
    value = _mapping(value)
    middle, bounds = finite(value.get("share")), value.get("interval")
    if middle is None or not isinstance(bounds, list) or len(bounds) != 2 or None in map(finite, bounds):
        return "–"
    return f"{percent(middle)} [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def _samples(verdict: dict[str, Any]) -> str:
    """The first answers, of which no two are to the same prompt."""
    samples, rows = verdict.get("samples"), []
    for sample in (samples if isinstance(samples, list) else [])[:_SAMPLES]:
        sample = _mapping(sample)
        answers = [_mapping(sample.get(model)) for model in models(verdict)]
        rows.append([f"<mark>{shown(sample.get('prompt', ''))}</mark>", *(
            f"{shown(answer.get('text', ''))} <small>{'positive' if answer.get('positive') else 'negative'}</small>"
            for answer in answers)])
    return table(["prompt", *map(shown, models(verdict))], rows, "answers") if rows else ""


def _mapping(value: Any) -> dict:
    return value if isinstance(value, dict) else {}
