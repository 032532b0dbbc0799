"""`launch.py judge MODEL questions=FILE judge.base_url=… judge.model=…`: answers that another model rates."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ctllm_jax.cli.outputs import check_writable
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.judge import OF_A_MODEL, JudgeConfig
from ctllm_jax.config.statuses import DONE, FAILED

if TYPE_CHECKING:
    from rich.console import Console

    from ctllm_jax.cli import Context
    from ctllm_jax.data.questions import Question
    from ctllm_jax.evaluation.judge.answers import Answerer, Given
    from ctllm_jax.evaluation.judge.judging import Judge

SCHEMA = JudgeConfig
USAGE = """
usage: python launch.py judge [MODEL | ANSWERS …] questions=FILE judge.base_url=URL judge.model=NAME [key=value …]

MODELs (a run of sft or dpo, RUN@STEP, a Hugging Face folder), an endpoint (answers.base_url), and files of answers
(MT-Bench's layout as .jsonl, or the judge-….json of an earlier command) are rated from 1 to 10, question by question,
by the model behind an OpenAI-compatible endpoint. Answers and judgments are stored, and the same command continues:
  python launch.py judge runs/chat questions=chc-bench judge.base_url=http://localhost:8000/v1 judge.model=NAME
  python launch.py judge runs/sft runs/dpo questions=FILE compare=all output=DIR judge.base_url=URL judge.model=NAME
  python launch.py judge answers.jsonl questions=FILE output=DIR judge.base_url=URL judge.model=NAME --dry-run
A hosted judge wants a key: judge.api_key_env names the variable that holds it.
"""
_UNFIT = re.compile(r"[^\w.@-]+")  # for the name of a file


class Side(NamedTuple):
    """A source of answers: its name; a MODEL, an endpoint, or given answers with their earlier record; and the place of
    its own record in addition to `output`."""

    name: str
    model: str | None = None
    endpoint: Answerer | None = None
    given: Given | None = None
    folder: Path | None = None
    step: int | None = None
    told: dict[str, Any] | None = None


def run(context: Context) -> int:
    """Have the questions answered and judged, and write the results."""
    from ctllm_jax.cli.judge_tables import show_plan
    from ctllm_jax.data.questions import choose, read_questions
    from ctllm_jax.evaluation.judge.judging import Judge
    from ctllm_jax.evaluation.judge.prompts import PROMPTS, read_prompts

    config, console = context.config, context.console
    _check_targets(context.targets, config)
    questions = choose(read_questions(config.questions), categories=config.categories, limit=config.limit)
    _check_temperatures(config, questions)
    judge = Judge(config.judge, read_prompts(config.judge.prompts) if config.judge.prompts else PROMPTS)
    sides = _sides(context, questions)
    if context.dry_run:
        show_plan(config, questions, sides, judge, console)
        return DONE
    folder = _folder(config, sides)
    set_name = config.name or _UNFIT.sub("_", Path(config.questions).resolve().name.partition(".")[0])
    return _judge(context, questions, sides, judge, folder=folder, set_name=set_name)


def _check_targets(targets: Sequence[str], config: JudgeConfig) -> None:
    if not targets and config.answers.base_url is None:
        raise UserError("judge needs someone who answers: a MODEL or a file of answers behind the command, or "
                        "answers.base_url and answers.model")
    for target in targets:
        path = Path(target) if target.endswith((".json", ".jsonl")) else Path(re.sub(r"@\d+$", "", target))
        if not path.exists():
            raise UserError(f"{target}: there is no {path} (a MODEL is a run directory, RUN@STEP or a Hugging Face "
                            "folder; answers are a .jsonl file, or a judge-….json)")
    if len(set(targets)) < len(targets):
        raise UserError(f"{next(each for each in targets if targets.count(each) > 1)} is given twice")
    models = [target for target in targets if not target.endswith((".json", ".jsonl"))]
    of_all = tuple(type(config.answers).model_fields) if config.answers.base_url is None else OF_A_MODEL
    if not models and (given := config.answers.given(of_all)):
        also = " or an endpoint" if config.answers.base_url is None else ""
        raise UserError(f"answers.{given[0]} is only read for a MODEL{also}, and none is given")
    if models and (config.answers.max_tokens is None or config.answers.temperature is None):
        raise UserError("answers.max_tokens and answers.temperature may only be null without a MODEL")
    if config.compare != "none" and len(targets) + (config.answers.base_url is not None) < 2:
        raise UserError(f"compare={config.compare} needs two who answer")


def _check_temperatures(config: JudgeConfig, questions: Sequence[Question]) -> None:
    from ctllm_jax.data.questions import CATEGORIES, canonical

    known = {*CATEGORIES, *(question.category for question in questions)}
    if unknown := [name for name in config.answers.temperatures if canonical(name) not in known]:
        raise UserError(f"answers.temperatures: there is no category {unknown[0]}; there are "
                        + ", ".join(sorted(known)))


def _sides(context: Context, questions: Sequence[Question]) -> list[Side]:
    """The sources of answers, with distinct names."""
    from ctllm_jax.evaluation.judge.answers import Answer, EndpointAnswerer, read_answers
    from ctllm_jax.evaluation.judge.judge import read_judged

    config = context.config
    sides = []
    for target in context.targets:
        if target.endswith(".json"):
            result = read_judged(target)
            given = {(row["question_id"], turn): Answer(each["answer"], each["is_cut"], each["note"])
                     for row in result.record["answers"] for turn, each in enumerate(row["turns"])
                     if each["answer"] is not None}
            _check_given(target, result.record, questions)
            sides.append(Side(result.answerer, given=given, told=result.record["answerer"]))
        elif target.endswith(".jsonl"):
            name, given = read_answers(target, questions)
            sides.append(Side(name or Path(target).name.removesuffix(".jsonl"), given=given))
        elif context.dry_run:
            sides.append(Side(target, model=target))
        else:
            sides.append(_model_side(target))
    if config.answers.base_url is not None:
        answerer = EndpointAnswerer(config.answers)
        sides.append(Side(answerer.name, endpoint=answerer))
    seen = [side.name for side in sides]
    if twice := [name for name in seen if seen.count(name) > 1]:
        raise UserError(f"two who answer are called {twice[0]}: name the endpoint's answers (answers.name), or move a "
                        "folder or file")
    return sides


def _model_side(target: str) -> Side:
    from ctllm_jax.huggingface.model import is_huggingface
    from ctllm_jax.training.checkpoints.checkpoint import find_checkpoint

    run_dir, kept = find_checkpoint(target)
    if is_huggingface(run_dir):
        return Side(run_dir.resolve().name, model=target)
    return Side(f"{run_dir.resolve().name}@{kept.step}", model=target, step=kept.step,
                folder=run_dir / "evaluation" / str(kept.step))


def _check_given(target: str, record: dict[str, Any], questions: Sequence[Question]) -> None:
    """An earlier result answers these very questions."""
    kept = {row["question_id"]: [turn["question"] for turn in row["turns"]] for row in record["answers"]}
    for question in questions:
        if kept.get(question.id) != list(question.turns):
            raise UserError(f"{target} answers other questions: {question.id} ({question.source}) is "
                            f"{'another one there' if question.id in kept else 'not among them'}")


def _folder(config: JudgeConfig, sides: Sequence[Side]) -> Path:
    if config.output is not None:
        return Path(config.output)
    if len(sides) == 1 and sides[0].folder is not None:
        check_writable(sides[0].folder, f"{sides[0].folder} (results, unless output=FOLDER is given)")
        return sides[0].folder
    raise UserError("output must be given: a folder for the tables and what they came from "
                    f"({'several answer' if len(sides) > 1 else 'it is no run directory that answers'})")


def _judge(context: Context, questions: Sequence[Question], sides: Sequence[Side], judge: Judge, *, folder: Path,
           set_name: str) -> int:
    from rich.markup import escape

    from ctllm_jax.cli.judge_tables import show_results
    from ctllm_jax.cli.progress import count_bar
    from ctllm_jax.data.questions import hash_of
    from ctllm_jax.evaluation.judge import judge as records
    from ctllm_jax.evaluation.judge.judging import choices, ratings, turns_of
    from ctllm_jax.inference.keyed_file import KeyedFile
    from ctllm_jax.report import judge as report
    from ctllm_jax.report.page import save

    config, console = context.config, context.console
    turns = len(turns_of(questions))
    # A part of a set is no result of the set: it has files of its own.
    is_part = bool(config.limit or config.categories)
    console.print(f"{escape(set_name)}: {len(questions):,} questions, {turns:,} turns, judged by "
                  f"{escape(config.judge.model)} at {escape(config.judge.base_url)}")
    check = _Once(judge.check if config.judge.check else lambda: None)
    with KeyedFile(folder / f"judge-{set_name}.answers.jsonl") as answers, \
            KeyedFile(folder / f"judge-{set_name}.judgments.jsonl") as judgments:
        if not judgments.rows:
            check()  # before a model is loaded; else, before the first thing that is asked for
        given, told = {}, {}
        for side in sides:
            given[side.name], told[side.name] = _answer(side, config, questions, answers, check, console, turns)
        rated = {side.name: ratings(judge, questions, given[side.name]) for side in sides}
        pairs = [] if config.compare == "none" else list(combinations(given, 2))
        pairs = [pair for pair in pairs if config.compare == "all" or pair[0] == sides[0].name]
        chosen = {pair: choices(judge, questions, *(given[name] for name in pair)) for pair in pairs}
        items = [item for asked, _ in (*rated.values(), *chosen.values()) for item in asked]
        with count_bar(console, "judgments", total=len(items)) as advance:
            judge.ask(items, file=judgments, advance=advance, before=check)
        head = records.head_of(
            set_name, questions, judge, date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            path=config.questions, sha256=hash_of(questions), used=[item.prompt for item in items],
            served=sorted({judgments.rows[item.key]["model"] for item in items if item.key in judgments}))
        results = [records.judged_record({**head, "answerer": told[name]}, questions, given[name], read(judgments),
                                         resamples=config.resamples, is_part=is_part)
                   for name, (_, read) in rated.items()]
        compared = records.comparison_record(head, [
            records.comparison_of(*pair, questions, read(judgments), resamples=config.resamples)
            for pair, (_, read) in chosen.items()]) if chosen else None
    stem = f"judge-{set_name}" + (".part" if is_part else "")
    paths = []
    for side, record in zip(sides, results, strict=True):
        if side.folder is not None:
            paths.append(records.write_record(side.folder / f"{stem}.json", record))
        if config.output is not None:
            paths.append(records.write_record(folder / f"{stem}.{_UNFIT.sub('_', side.name)}.json", record))
    if compared:
        paths.append(records.write_record(folder / f"{stem}.comparison.json", compared))
    paths.append(save(report.markdown(results, compared), folder / f"{stem}.md"))
    paths.append(save(report.page(results, compared), folder / f"{stem}.html"))
    show_results(results, compared, console)
    console.print("\n".join(escape(str(path)) for path in paths))
    missing = sum(record["scores"]["micro"]["missing"] for record in results)
    missing += sum(each["missing"] for each in compared["comparisons"]) if compared else 0
    if missing:
        console.print(f"[yellow]warning:[/] {missing:,} answers or judgments did not come; the same command asks again")
    return FAILED if missing else DONE


class _Once:
    """A function that is called at most once, with a name that says so."""

    def __init__(self, function: Callable[[], None]):
        self._function: Callable[[], None] | None = function

    def __call__(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            function()


def _answer(side: Side, config: JudgeConfig, questions: Sequence[Question], file, check: Callable[[], None],
            console: Console, turns: int) -> tuple[Given, dict[str, Any]]:
    """All answers of one side, and its entry in the record."""
    from rich.markup import escape

    from ctllm_jax.cli.progress import count_bar
    from ctllm_jax.evaluation.judge.answers import ModelAnswerer, answer

    told: dict[str, Any] = {"name": side.name, "step": side.step, "model": side.model}
    if side.given is not None:
        return side.given, side.told or {**told, "kind": "file"}
    answerer = side.endpoint or ModelAnswerer(side.model, config.answers, name=side.name, questions=questions)
    with count_bar(console, escape(f"answers of {side.name}"), total=turns) as advance:
        given = answer(answerer, questions, config.answers, file=file, advance=advance, before=check)
    settings = config.answers.model_dump(mode="json", include={"temperature", "temperatures"})
    where = {} if side.endpoint is None else {"base_url": config.answers.base_url}
    return given, {**told, **answerer.identity, **settings, **where, "model": side.model or config.answers.model}
