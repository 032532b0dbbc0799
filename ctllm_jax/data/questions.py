"""Read files of questions for the LLM judge (CHC-Bench, MT-Bench), and the names of their categories. No jax.

| layout | a row |
|---|---|
| CHC-Bench | `query`, `category` (`source`, `type`, `multi_choice` are not read); a file a category, or one for all |
| MT-Bench | `question_id`, `category`, `turns` (one or two texts), `reference` (a text for each turn) where known |

`question` and `prompt` mean the same as `query`, and any row may have `question_id` or `id`, and `reference`. Different
spellings of a category are merged: zh_roleplay, roleplaying and role-playing are roleplay.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ctllm_jax.config.control import HALF, holds_surrogate
from ctllm_jax.config.errors import UserError
from ctllm_jax.data.conversations import read_rows
from ctllm_jax.data.layouts import CONTEXT, DIALOGUES, HISTORY, INPUT, REFUSED, SYSTEM, is_empty

CATEGORIES = {"writing": ("writing", "写作"), "humanities": ("humanity", "人文"), "science": ("science", "科学"),
              "roleplay": ("role-playing", "角色扮演"), "reading": ("reading comprehension", "阅读理解"),
              "math": ("math", "数学"), "hard_case": ("hard cases", "中文疑难"), "coding": ("coding", "编程"),
              "reasoning": ("reasoning", "推理"), "extraction": ("extraction", "信息抽取"), "stem": ("STEM", "理工")}
"""Name -> in English, in Chinese; in the order of CT-LLM's paper, then those of MT-Bench alone."""
_ALIASES = {"writting": "writing", "social": "humanities", "humanity": "humanities", "roleplaying": "roleplay",
            "role_playing": "roleplay", "role_play": "roleplay", "read_compre": "reading",
            "reading_comprehension": "reading", "hard_cases": "hard_case", "code": "coding"}
_TEXT_FIELDS = ("query", "question", "prompt")
_UNUSED = [field for field, becomes in DIALOGUES["alpaca"].items()
           if becomes in (CONTEXT, INPUT, HISTORY, SYSTEM, REFUSED)]
_MOST_TURNS = 2


class Question(NamedTuple):
    """A question.

    Attributes:
      id: that of the row, or its category and number.
      turns: one text, or two that are asked in turn.
      references: a correct answer for each of the first turns; empty: none.
      source: the file and the row, from 1.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...]
    source: str


def read_questions(path: Path | str) -> list[Question]:
    """Read all questions of a file, or of the files below a folder in order of their paths.

    A row's category is its own if that is known; else the one in its file's name (hard_case.json,
    hard_case-00000-of-00001.parquet), if known; else its own; else the file's name.

    Raises:
      UserError: a row is not a question (with file and row), an id occurs twice, or there are no questions.
    """
    numbers: Counter[str] = Counter()

    def parse(record: dict, file: Path, row: int) -> Question:
        if holds_surrogate(record):
            raise ValueError(f"a text holds {HALF}")
        category = _category(record.get("category"), file)
        if unused := next((field for field in _UNUSED if not is_empty(record.get(field))), None):
            raise ValueError(f"field {unused!r} changes what is asked, and is not read: write it into the question")
        turns = _turns(record)
        numbers[category] += 1
        name = next((record[field] for field in ("question_id", "id") if record.get(field) not in (None, "")), None)
        if not isinstance(name, int | str | None) or isinstance(name, bool):
            raise ValueError(f"question_id must be a number or a text, not {type(name).__name__}")
        return Question(f"{category}-{numbers[category]}" if name is None else str(name), category, turns,
                        _references(record.get("reference"), len(turns)), f"{file}:{row}")

    def located(record: dict, file: Path, row: int) -> Question:
        try:
            return parse(record, file, row)
        except ValueError as error:
            raise UserError(f"{file}:{row}: {error}") from None

    try:
        questions = read_rows(path, located).parsed
    except UserError as error:  # any bad row is an error here
        raise UserError(str(error).partition(". Bad records:")[0]) from None
    if not questions:
        raise UserError(f"questions={path} has no question")
    seen: dict[str, Question] = {}
    for question in questions:
        if question.id in seen:
            raise UserError(f"{question.source}: question_id {question.id} is also that of {seen[question.id].source}")
        seen[question.id] = question
    order = in_order(question.category for question in questions)
    return sorted(questions, key=lambda question: order.index(question.category))


def choose(questions: Iterable[Question], *, categories: Collection[str] = (), limit: int | None = None
           ) -> list[Question]:
    """Select some categories, and the first `limit` questions of each. Raises UserError for an unknown category."""
    questions = list(questions)
    known = dict.fromkeys(question.category for question in questions)
    wanted = {canonical(name) for name in categories}
    if unknown := [name for name in categories if canonical(name) not in known]:
        raise UserError(f"categories={unknown[0]}: there are {', '.join(known)}")
    counts: Counter[str] = Counter()
    chosen = []
    for question in questions:
        if not wanted or question.category in wanted:
            counts[question.category] += 1
            if limit is None or counts[question.category] <= limit:
                chosen.append(question)
    return chosen


def canonical(category: str) -> str:
    """The canonical name of a category."""
    name = re.sub(r"[\s\-]+", "_", category.strip().lower()).removeprefix("zh_")
    return _ALIASES.get(name, name)


def in_order(categories: Iterable[str]) -> list[str]:
    """Each category once, in the order of tables: known ones, then others in the order of the file."""
    there = dict.fromkeys(categories)
    return [name for name in CATEGORIES if name in there] + [name for name in there if name not in CATEGORIES]


def names_of(category: str) -> tuple[str, str]:
    """A category in English and in Chinese; an unknown one has its own name, and no Chinese name."""
    return CATEGORIES.get(category, (category, ""))


def hash_of(questions: Iterable[Question]) -> str:
    """Hash of all questions, independent of files and order, 16 hexadecimal digits."""
    content = sorted(json.dumps([question.category, question.turns, question.references]) for question in questions)
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]


def _category(value: Any, file: Path) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"category must be a text, not {type(value).__name__}")
    own = canonical(value or "")
    of_file = canonical(re.sub(r"(-\d+-of-\d+)?\.(jsonl?|parquet)(\.\w+)?$", "", file.name))
    return own if own in CATEGORIES or own and of_file not in CATEGORIES else of_file


def _turns(record: dict) -> tuple[str, ...]:
    if record.get("turns") is not None:
        turns = record["turns"]
        if not isinstance(turns, list) or not 1 <= len(turns) <= _MOST_TURNS:
            raise ValueError("turns must be a list of one or two texts")
    else:
        name = next((name for name in _TEXT_FIELDS if record.get(name) is not None), None)
        if name is None:
            raise ValueError(f"no question: a row has {', '.join(_TEXT_FIELDS)} or turns; this one has "
                             f"{', '.join(record) or 'nothing'}")
        turns = [record[name]]
    if not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError("a question must be a text, and not empty")
    return tuple(turns)


def _references(value: Any, turns: int) -> tuple[str, ...]:
    """References up to the first turn that has none, because the second is useless without the first."""
    found = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(found, list) or len(found) > turns or not all(isinstance(each, str | None) for each in found):
        raise ValueError(f"reference must be a list of at most {turns} {'texts' if turns > 1 else 'text'}, one a turn")
    references = []
    for each in found:
        if not (each or "").strip():
            break
        references.append(each)
    return tuple(references)
