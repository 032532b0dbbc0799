"""HumanEval and MBPP with lm-eval's prompts and our sandbox.

lm-eval runs model-written code inside its own process, by a script that it loads from the network. Here the definition
is read, and its functions that would load that script are replaced.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ctllm_jax.evaluation.code.sandbox import run_programs
from ctllm_jax.evaluation.sources import Source

Rows = Sequence[dict[str, Any]]
Responses = Sequence[Sequence[str]]


def _after_prompt(response: str, row: dict[str, Any]) -> str:
    return row["prompt"] + response


def _after_prompt_in_block(response: str, row: dict[str, Any]) -> str:
    return row["prompt"] + response.partition("```")[0]


def _as_it_is(response: str, row: dict[str, Any]) -> str:
    return response


def _first_block(response: str, row: dict[str, Any]) -> str:
    """The code of the first non-empty block; the prompt has opened one, so the response may begin inside it.

    lm-eval reads a first word as the block's language, and so loses the `def` of an answer that begins with it.
    """
    first, *others = response.split("```")
    parts = [first, *(re.sub(r"\A\w*\n", "", part) for part in others)]
    return next((part for part in parts if part.strip()), "")


TASKS: dict[str, tuple[Callable[[str, dict[str, Any]], str], str]] = {
    "humaneval": (_after_prompt, "pass@{k}"),
    "humaneval_64": (_after_prompt, "pass@{k}"),
    "humaneval_instruct": (_after_prompt_in_block, "pass@{k}"),
    "mbpp": (_as_it_is, "pass_at_{k}"),
    "mbpp_instruct": (_first_block, "pass_at_{k}"),
}
"""Task -> function from a response to its program, and lm-eval's name of its score."""


def configure(name: str, cfg: dict[str, Any], source: Source, *, folder: Path) -> dict[str, Any]:
    """The definition of a code task with our sandbox instead of lm-eval's functions.

    Args:
      name: one of `TASKS`.
      cfg: lm-eval's definition, functions unresolved.
      source: its questions.
      folder: folder of the definition, whose `utils.py` has its three examples.
    """
    program_of, label = TASKS[name]
    ks = [k for metric in cfg["metric_list"] for k in metric.get("k", [1])]
    filter_name = cfg["filter_list"][0]["name"] if cfg.get("filter_list") else "none"

    def run(responses: Responses, rows: Rows) -> list[list[dict[str, Any]]]:
        return run_responses(responses, rows, program_of=program_of, test_of=_test_of(name))

    def score(row: dict[str, Any], results: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float]:
        outcomes = results[0]
        passed = sum(outcome["status"] == "passed" for outcome in outcomes)
        return {label.format(k=k): pass_at_k(len(outcomes), passed, k) for k in ks}

    own = {
        "custom_dataset": source, "unsafe_code": False, "process_results": score,
        "metric_list": [{"metric": label.format(k=k), "aggregation": "mean", "higher_is_better": True} for k in ks],
        "filter_list": [{"name": filter_name, "filter": [{"function": "custom", "filter_fn": run}]}],
    }
    if "samples" in cfg.get("fewshot_config", {}):
        own["fewshot_config"] = {**cfg["fewshot_config"], "samples": read_examples(folder / "utils.py")}
    return {key: value for key, value in {**cfg, **own}.items() if key != "tag"}


def _test_of(name: str) -> Callable[[dict[str, Any]], str]:
    if name.startswith("humaneval"):
        return lambda row: f"{row['test']}\ncheck({row['entry_point']})"
    return lambda row: "\n".join(row["test_list"][:3])


def run_responses(responses: Responses, rows: Rows, *, program_of: Callable[[str, dict[str, Any]], str],
                  test_of: Callable[[dict[str, Any]], str]) -> list[list[dict[str, Any]]]:
    """Run every response to every question, followed by the question's tests: status, end of the output, program.

    Equal programs, such as repeated greedy answers, are run once.
    """
    programs = [[f"{program_of(response, row)}\n{test_of(row)}" for response in of_row]
                for of_row, row in zip(responses, rows, strict=True)]
    distinct = list(dict.fromkeys(program for of_row in programs for program in of_row))
    outcomes = dict(zip(distinct, run_programs(distinct), strict=True))
    return [[{"status": outcomes[program].status, "output": outcomes[program].output[-500:], "program": program}
             for program in of_row] for of_row in programs]


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples passes (arXiv 2107.03374, equation 1).

    Raises:
      ValueError: there are fewer than k samples.
    """
    if k > samples:
        raise ValueError(f"pass@{k} needs at least {k} samples of each question; there are {samples}")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def read_examples(path: Path) -> list[dict[str, Any]]:
    """The examples that `list_fewshot_samples` of a file gives, read without running the file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == "list_fewshot_samples":
            return ast.literal_eval(node.body[-1].value)
    raise ValueError(f"{path} has no list_fewshot_samples: this lm-eval is not one of 0.4")
