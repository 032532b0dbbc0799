"""Read files of preference pairs as a prompt and two answers, in the layouts that `layouts.PAIRS` describes. No jax.

An `output` is [chosen, rejected], and further items are ignored. Of `completions`, the best is chosen and the worst
rejected. Texts of `Human:` and `Assistant:` turns (hh) differ in the last answer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ctllm_jax.config.errors import UserError
from ctllm_jax.data.chat import Message
from ctllm_jax.data.conversations import read_rows
from ctllm_jax.data.layouts import PAIRS, Dropped, check_fields, dialogue_of, kind_of
from ctllm_jax.dataset.text import checked_value

_PROMPTS = ("prompt", "question", "query", "instruction")
_EXPECTED = ("chosen + rejected (with prompt, or one beginning), conversations + chosen + rejected, "
             "instruction + output [chosen, rejected], instruction + completions [{response, overall_score}]")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SCORES = ("overall_score", "fine-grained_score")
logger = logging.getLogger(__name__)


class Pair(NamedTuple):
    """A prompt, the preferred and the rejected answer, and their place, as in `Dialogue`."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    file: Path
    row: int

    def dialogues(self) -> tuple[list[Message], list[Message]]:
        """The prompt with either answer, the chosen one first."""
        return tuple([*self.prompt, Message("assistant", answer)] for answer in (self.chosen, self.rejected))


class Pairs(NamedTuple):
    """The pairs, the layout of each file in words, rows read, rows left out by reason."""

    pairs: list[Pair]
    layouts: dict[str, str]
    rows: int
    dropped: dict[str, int]


def read_pairs(path: Path | str, *, layout: str | None = None, max_bad: int = 0) -> Pairs:
    """Read all pairs of a file, or of the files below a folder in order of their paths.

    A row is dropped and counted if its answers differ only in white space, if one of them is empty, or if it has no
    prompt. A row that cannot be read counts against `max_bad`. Raises UserError if there are more, or if no layout is
    recognized, with the fields that were seen.
    """
    layouts: dict[str, str] = {}
    detected: dict[Path, str] = {}
    tables: dict[Path, dict[str, str]] = {}

    def parse(record: dict, file: Path, row: int) -> Pair:
        found = layout or detected.get(file) or detect_layout(record)
        if found is None:
            seen = ", ".join(f"{name} ({kind_of(value)})" for name, value in list(record.items())[:12]) or "none"
            raise UserError(f"{file}:{row}: no known layout of pairs; fields seen: {seen}; needed: {_EXPECTED}")
        if file not in detected:
            detected[file], tables[file] = found, PAIRS[found]
            layouts[str(file)] = f"{found} ({', '.join(list(record)[:8])})"
            logger.info("%s: %s", file, layouts[str(file)])
        check_fields(record, PAIRS[found])
        return Pair(*_checked(*_PARSERS[found](record, PAIRS[found])), file, row)

    read = read_rows(path, parse, max_bad=max_bad, tables=tables)
    if not read.parsed:
        raise UserError(f"{path} holds no pair of different answers ({read.rows} rows, {read.dropped or 'all empty'})")
    return Pairs(read.parsed, layouts, read.rows, read.dropped)


def detect_layout(record: dict[str, Any]) -> str | None:
    """Return the layout that matches the fields of a row, or None."""
    has_both = "chosen" in record and "rejected" in record
    if has_both and isinstance(record.get("conversations"), list):
        return "sharegpt"
    if "instruction" in record and isinstance(record.get("completions"), list):
        return "ultrafeedback"
    if "instruction" in record and isinstance(record.get("output"), list):
        return "alpaca"
    if not has_both:
        return None
    if isinstance(record["chosen"], str) and not any(name in record for name in _PROMPTS):
        turns = _TURN.match(record["chosen"].lstrip())
        return "hh" if turns and turns[1] == "Human" else "trl"
    return "trl"


def _from_trl(record: dict, fields: dict[str, str]) -> tuple[Sequence[Message], str, str]:
    chosen, rejected = _both(record)
    name = next((name for name in (*_PROMPTS, "input") if record.get(name) is not None), None)
    if name is None and isinstance(chosen, str):
        # Their common beginning is the prompt, up to the last space before they differ.
        chosen, rejected = checked_value(chosen, "chosen"), checked_value(rejected, "rejected")
        same = next((index for index, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
                    min(len(chosen), len(rejected)))
        same -= chosen[same - 1:same] == " "
        record = {**record, "prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}
        name = "prompt"
    return _sides(record, fields, name)


def _from_sharegpt(record: dict, fields: dict[str, str]) -> tuple[Sequence[Message], str, str]:
    _both(record)
    return _sides(record, fields, None)


def _from_alpaca(record: dict, fields: dict[str, str]) -> tuple[Sequence[Message], str, str]:
    output = record.get("output")
    if not isinstance(output, list):
        raise ValueError(f"field 'output' is not a list of answers but {kind_of(output)}")
    if len(output) < 2:
        raise Dropped("fewer than two answers")
    return _sides({**record, "chosen": output[0], "rejected": output[1]}, fields, "instruction")


def _from_ultrafeedback(record: dict, fields: dict[str, str]) -> tuple[Sequence[Message], str, str]:
    scored, completions = [], record.get("completions") or []
    if not isinstance(completions, list) or any(not isinstance(entry, dict) for entry in completions):
        raise ValueError(f"field 'completions' is not a list of objects but {kind_of(completions)}")
    for entry in completions:
        score = next((entry[name] for name in _SCORES if entry.get(name) is not None), None)
        if not isinstance(score, (int, float)) or isinstance(score, bool):
            raise ValueError(f"a completion has no number under {' or '.join(_SCORES)}")
        scored.append((score, entry.get("response")))
    if len(scored) < 2:
        raise Dropped("fewer than two answers")
    best, worst = max(scored, key=lambda each: each[0]), min(scored, key=lambda each: each[0])
    if best[0] == worst[0]:
        raise Dropped("answers of equal score")
    return _sides({**record, "chosen": best[1], "rejected": worst[1]}, fields, "instruction")


def _from_hh(record: dict, fields: dict[str, str]) -> tuple[Sequence[Message], str, str]:
    sides = {}
    for name, text in zip(("chosen", "rejected"), _both(record), strict=True):
        parts = _TURN.split(checked_value(text, name).lstrip())
        if parts[0].strip() or len(parts) < 3:
            raise ValueError(f"field {name!r} does not begin with a turn of Human: or Assistant:")
        roles = {"Human": "user", "Assistant": "assistant"}
        sides[name] = [{"role": roles[who], "content": said.strip()}
                       for who, said in zip(parts[1::2], parts[2::2], strict=True)]
    return _sides({**record, **sides}, fields, None)


_PARSERS = {"trl": _from_trl, "sharegpt": _from_sharegpt, "alpaca": _from_alpaca, "ultrafeedback": _from_ultrafeedback,
            "hh": _from_hh}


def _both(record: dict) -> tuple[Any, Any]:
    for name in ("chosen", "rejected"):
        if name not in record:
            raise ValueError(f"no field {name!r}; its fields are {', '.join(record) or 'none'}")
    return record["chosen"], record["rejected"]


def _sides(record: dict, fields: dict[str, str], question: str | None) -> tuple[Sequence[Message], str, str]:
    """The prompt that `chosen` and `rejected` share, and their last answers."""
    if any(side in (None, "") or isinstance(side, dict) and side.get("value", side.get("content")) is None
           for side in _both(record)):
        raise Dropped("an empty answer")
    chosen, rejected = (dialogue_of(record, fields, question=question, answer=name) for name in ("chosen", "rejected"))
    for side in (chosen, rejected):
        if not side or side[-1].role != "assistant":
            raise Dropped("no answer at the end")
        if side[-1].weight != 1:
            raise Dropped("a weight on an answer of a pair")
    if [message[:2] for message in chosen[:-1]] != [message[:2] for message in rejected[:-1]]:
        raise Dropped("answers to different prompts")
    return chosen[:-1], chosen[-1].content, rejected[-1].content


def _checked(prompt: Sequence[Message], chosen: str, rejected: str) -> tuple[tuple[Message, ...], str, str]:
    """Return the pair if it can be trained on. An empty system prompt counts as none."""
    if not chosen.strip() or not rejected.strip():
        raise Dropped("an empty answer")
    if chosen.strip() == rejected.strip():
        raise Dropped("equal answers")
    if prompt and prompt[0].role == "system" and not prompt[0].content.strip():
        prompt = prompt[1:]
    if not prompt or prompt[-1].role != "user" or not all(message.content.strip() for message in prompt):
        raise Dropped("no prompt")
    if any(message.role == "system" for message in prompt[1:]):
        raise Dropped("system prompt after the first message")
    return tuple(Message(message.role, message.content) for message in prompt), chosen, rejected
