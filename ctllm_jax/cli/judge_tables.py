"""The terminal output of `launch.py judge`: the plan, and the results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ctllm_jax.config.judge import JudgeConfig
from ctllm_jax.data.questions import Question, in_order, names_of
from ctllm_jax.evaluation.judge.judging import Judge, turns_of
from ctllm_jax.report import judge as report
from ctllm_jax.report.readable import visible

_CJK = re.compile("[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]")


def show_results(results: Sequence[dict[str, Any]], compared: dict[str, Any] | None, console: Console) -> None:
    """The tables on a terminal, or as wide as they must be in a log."""
    def show(head: Sequence[str], rows: Sequence[Sequence[str]], lefts: int) -> None:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        for index, name in enumerate(head):
            table.add_column(Text(visible(name)), justify="left" if index < lefts else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(visible(cell)) for cell in row))
        (console if console.is_terminal else Console(file=console.file, width=200, highlight=False)).print(table)

    rows = [*report.score_rows(results), *([first, "", *rest] for first, *rest in report.count_rows(results))]
    show(["", "questions", *report.names(results)], rows, 1)
    if compared:
        show(report.COMPARISON_HEAD, report.comparison_rows(compared["comparisons"]), 2)


def show_plan(config: JudgeConfig, questions: Sequence[Question], sides: Sequence[Any], judge: Judge,
               console: Console) -> None:
    """Show the planned requests, and one prompt as the judge would read it."""
    turns = turns_of(questions)
    counts = [(name, sum(question.category == name for question in questions))
              for name in in_order(question.category for question in questions)]
    console.print(f"{escape(config.questions)}: {len(questions):,} questions, {len(turns):,} turns, "
                  f"{sum(len(question.references) for question in questions):,} references")
    named = (f"{' '.join(filter(None, names_of(name)))} {count}" for name, count in counts)
    console.print("  " + escape(", ".join(named)))
    most = config.answers.max_tokens
    for side in sides:
        if side.given is not None:
            console.print(f"{escape(side.name)}: its answers are given")
        else:
            asked = sum(_tokens("".join(question.turns[:turn + 1])) for question, turn in turns)
            answers = f"at most {len(turns) * most:,} of answers" if most else "and answers without a limit"
            console.print(f"{escape(side.name)} would be asked {len(turns):,} times: about {asked:,} tokens of "
                          f"questions, {answers}")
    pairs = {"none": 0, "first": len(sides) - 1, "all": len(sides) * (len(sides) - 1) // 2}[config.compare]
    blanks = [(question, [""] * (turn + 1)) for question, turn in turns]
    ratings = [judge.rating(question, blank) for question, blank in blanks]
    verdicts = [judge.verdict(question, blank, blank) for question, blank in blanks] if pairs else []
    tokens = [sum(_tokens(message.content) for item in items for message in item.messages)
              for items in (ratings, verdicts)]
    requests = len(sides) * len(ratings) + 2 * pairs * len(verdicts)
    console.print(f"{escape(config.judge.model)} at {escape(config.judge.base_url)} would be asked {requests:,} times "
                  f"(ratings {len(sides) * len(ratings):,}, choices {2 * pairs * len(verdicts):,}): about "
                  f"{len(sides) * tokens[0] + 2 * pairs * tokens[1]:,} tokens of prompts beside the answers, "
                  + (f"at most {requests * config.judge.max_tokens:,} of judgments" if config.judge.max_tokens else
                     "and judgments without a limit"))
    console.print("tokens are guessed: one for a Chinese character, one for four others; what was made before is not "
                  "asked for again")
    question, turn = turns[-1]
    item = judge.rating(question, [f"(answer {number + 1})" for number in range(turn + 1)])
    console.print(f"\nprompt {item.prompt.name}, {item.prompt.sha256}, for question {escape(question.id)}:")
    for message in item.messages:
        console.print(f"[dim]{message.role}:[/]\n{escape(message.content)}")
    console.print("\nnothing was started")


def _tokens(text: str) -> int:
    wide = len(_CJK.findall(text))
    return wide + -(-(len(text) - wide) // 4)
