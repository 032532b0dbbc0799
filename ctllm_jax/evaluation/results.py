"""Results of an evaluation: lm-eval's JSON with our additions, its files, and its intervals. No jax.

RUN/evaluation/STEP/ has a file for each set of tasks and number of examples, such as `cmmlu+mmlu-5shot.json` (with
`-limit100` if not all questions were asked, `-chat` if a chat template was used), `….samples.jsonl` if requested, and
`answers.jsonl` with all answers so far. `read_results` returns all results of a run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctllm_jax.config.errors import UserError
from ctllm_jax.storage import write_whole

FOLDER = "evaluation"
ANSWERS = "answers.jsonl"
OURS = "ctllm_jax"
"""The key of our part of a result."""
Z_95 = 1.959963984540054
_LONGEST_NAME = 100
_NO_METRICS = ("name", "alias", "sample_len", "sample_count")
_OF_CHOICES = ("acc", "acc_norm", "acc_bytes", "exact_match")


def result_name(tasks: Sequence[str], *, num_fewshot: int | None, limit: float | None, chat: bool) -> str:
    """The name of a result's file, without its suffix; a hash replaces a long list of tasks."""
    name = "+".join(sorted(tasks))
    if len(name) > _LONGEST_NAME:
        name = f"{len(tasks)}-tasks-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    shots = "" if num_fewshot is None else f"-{num_fewshot}shot"
    return name + shots + ("" if limit is None else f"-limit{limit:g}") + ("-chat" if chat else "")


def result_folder(run_dir: Path, step: int) -> Path:
    """The folder of the results of a run's step."""
    return run_dir / FOLDER / str(step)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False, default=to_json) + "\n"
    write_whole(path, text.encode())


def write_samples(path: Path, samples: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Write every question in lm-eval's form as JSON lines, each with its `task`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    with open(partial, "w", encoding="utf-8") as file:
        for task, rows in samples.items():
            for row in rows:
                file.write(json.dumps({"task": task, **row}, ensure_ascii=False, default=to_json) + "\n")
    os.replace(partial, path)


def read_results(run: Path | str, *, step: int | None = None) -> list[dict[str, Any]]:
    """All results of a run, or of one step, in the order of steps and names, each with its `path`.

    Raises:
      UserError: a file that is no JSON.
    """
    folders = [path for path in (Path(run) / FOLDER).glob("*") if path.is_dir() and path.name.isdigit()
               and step in (None, int(path.name))]
    return [result for folder in sorted(folders, key=lambda path: int(path.name)) for result in read_folder(folder)]


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, in the order of their names; as `read_results`."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is malformed: {error}") from None
        if isinstance(result, dict) and "results" in result and OURS in result:
            found.append({**result, "path": str(path)})
    return found


def to_json(value: Any) -> Any:
    """Convert types that JSON lacks: numpy numbers to numbers, sets to lists, functions to names, the rest to text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return getattr(value, "__name__", None) or str(value)


def wilson_interval(hits: int, count: int, *, z: float = Z_95) -> tuple[float, float]:
    """The confidence interval of a share with `hits` of `count` draws: (lower, upper), by default at 95 %.

    Wilson 1927, J. Am. Stat. Assoc. 22:209: within [0, 1], and accurate near both ends, unlike the normal interval.
    """
    if not 0 <= hits <= count or not count:
        raise ValueError(f"{hits} of {count} is no share")
    share, spread = hits / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def metrics_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """`metric,filter` -> value of a task's or group's entry in `results`, without the standard errors."""
    return {name: float(value) for name, value in entry.items()
            if name not in _NO_METRICS and not name.partition(",")[0].endswith("_stderr")
            and isinstance(value, int | float) and not isinstance(value, bool)}


def intervals(result: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The 95 % interval of every metric of every task and group: `low`, `high`, `method`.

    Wilson's interval if the metric is a share of questions (`hits` of `count`), over all questions of a group if the
    group is averaged that way; else 1.96 standard errors of lm-eval; none if it gives none.

    Args:
      result: of `lm_eval.evaluate`, with its `samples`.
    """
    counts = {task: _count(rows) for task, rows in result["samples"].items()}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, entry in result["results"].items():
        for metric, value in metrics_of(entry).items():
            below = [counts[task].get(metric) for task in leaves(result, name)]
            interval = None
            if below and None not in below:
                hits, count = (sum(numbers) for numbers in zip(*below, strict=True))
                if count and abs(hits / count - value) < 1e-9:
                    low, high = wilson_interval(hits, count)
                    interval = {"low": low, "high": high, "method": "wilson", "hits": hits, "count": count}
            kind, _, chosen = metric.partition(",")
            error = entry.get(f"{kind}_stderr,{chosen}")
            if interval is None and isinstance(error, int | float) and math.isfinite(error):
                interval = {"low": value - Z_95 * error, "high": value + Z_95 * error, "method": "stderr"}
            if interval is not None:
                found.setdefault(name, {})[metric] = interval
    return found


def leaves(result: Mapping[str, Any], name: str) -> list[str]:
    """The tasks of a name in `results`: itself, or those of a group."""
    children = result.get("group_subtasks", {}).get(name)
    if not children:
        return [name] if name in result["samples"] else []
    return list(dict.fromkeys(task for child in children for task in leaves(result, child)))


def chance(result: Mapping[str, Any]) -> dict[str, float]:
    """The chance level of every task and group with multiple choice, weighted by questions in a group."""
    guessed = {}
    for task, rows in result["samples"].items():
        config = result["configs"].get(task, {})
        if config.get("output_type") != "multiple_choice":
            continue
        # Mutual information scores every choice a second time, without its question.
        times = 2 if any(each.get("metric") == "acc_mutual_info" for each in config.get("metric_list") or ()) else 1
        guessed[task] = [times / len(row["arguments"]) for row in rows]
    levels = {}
    for name in result["results"]:
        below = leaves(result, name)
        if below and all(task in guessed for task in below):
            shares = [share for task in below for share in guessed[task]]
            levels[name] = sum(shares) / len(shares)
    return levels


def is_of_choices(metric: str) -> bool:
    """Whether the level of `chance` applies to a metric (`acc,none`)."""
    return metric.partition(",")[0] in _OF_CHOICES


def _count(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """`metric,filter` -> (hits, questions), of metrics that are 0 or 1 for each question."""
    values: dict[str, list[Any]] = {}
    for row in rows:
        for metric in row["metrics"]:
            values.setdefault(f"{metric},{row['filter']}", []).append(row.get(metric))
    return {metric: (int(sum(each)), len(each)) for metric, each in values.items()
            if all(isinstance(value, int | float) or hasattr(value, "item") for value in each)
            and all(value in (0, 1) for value in each)}
