"""Results of evaluations, made up but of the layout that `evaluate` and `judge` write."""

import json

from ctllm_jax.evaluation import results


def write_run(directory, *, kind="base", ratio=None):
    """A run directory of which nothing was measured yet."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"base": "data:\n  isolate_documents: true\n", "dpo": "data:\n  epochs: 1\nloss:\n  beta: 0.5\n",
              "sft": f"data:\n  loss_on: answers\n  ratio: {ratio or 'null'}\n"}[kind]
    (directory / "config.yaml").write_text(config)
    return directory


def write_choices(run, step, tasks, *, tokens=None, shots=5, limit=None, max_length=4096, chat=False, date=1.0,
                  name=None, groups=None, metric="acc,none", choices=4, folder=None):
    """A result of multiple choice: `tasks` is name -> (hits, asked, questions there are), `groups` name -> tasks."""
    groups = groups or {}
    counts = {task: (hits, asked) for task, (hits, asked, _) in tasks.items()}
    for group, members in groups.items():
        counts[group] = tuple(sum(tasks[task][part] for task in members) for part in (0, 1))
    found, intervals = {}, {}
    for task, (hits, asked) in counts.items():
        low, high = results.wilson_interval(hits, asked)
        found[task] = {"alias": task, metric: hits / asked, f"{metric.replace(',', '_stderr,')}": 0.01,
                       "sample_len": asked}
        intervals[task] = {metric: {"low": low, "high": high, "method": "wilson", "hits": hits, "count": asked}}
    result = {
        "results": found, "group_subtasks": dict(groups), "configs": {}, "n-shot": dict.fromkeys(tasks, shots),
        "n-samples": {task: {"effective": asked, "original": there} for task, (_, asked, there) in tasks.items()},
        "date": date, results.OURS: {
            "wording": "lm-eval", "checkpoint": {"run": str(run), "step": step, "tokens": tokens}, "limit": limit,
            "template": {"kind": "chatml", "fingerprint": "0"} if chat else None, "max_length": max_length,
            "intervals": intervals, "chance": dict.fromkeys(counts, 1 / choices), "tasks": list(groups or tasks)}}
    path = (folder or results.result_folder(run, step)) / f"{name or '+'.join(groups or tasks)}-{shots}-{limit}.json"
    results.write_result(path, result)
    return path


def write_judged(run, step, categories, *, judge="gpt-4", failures=0, name="chc-bench"):
    """A record of `judge`: category -> (mean, questions)."""
    def score(mean, questions):
        return {"mean": mean, "interval": None if mean is None else [mean - 0.5, mean + 0.5], "rated": questions,
                "failures": failures, "missing": 0, "empty": 0, "cut": 0, "mean_if_failures_are_1": mean}

    means = [mean for mean, _ in categories.values() if mean is not None]
    total = score(sum(means) / len(means), sum(count for _, count in categories.values()))
    record = {
        "kind": "judge", "format": 1, "name": name, "date": "2026-11-24", "answerer": {"name": run.name, "step": step},
        "questions": {"sha256": "0" * 64, "count": sum(count for _, count in categories.values()), "path": "chc",
                      "categories": {each: {"count": count, "names": [each, each]}
                                     for each, (_, count) in categories.items()}},
        "judge": {"model": judge, "prompts_sha256": "1" * 16}, "answers": [],
        "scores": {"macro": total, "micro": total, "turns": {},
                   "categories": {each: score(*told) for each, told in categories.items()}}}
    path = results.result_folder(run, step) / f"judge-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path
