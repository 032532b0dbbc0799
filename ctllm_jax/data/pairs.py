"""Files of preference pairs in the layouts that are in use, to a prompt and two answers. No jax here.

| layout | a row |
|---|---|
| trl | `chosen` and `rejected`, texts or messages; `prompt` (question, query, instruction), or one beginning of both |
| sharegpt | `conversations` [{from, value}], and an answer each in `chosen` and `rejected` |
| alpaca | `instruction`, `input`, `history`, `system`, and `output` = [chosen, rejected], what follows unread |
| ultrafeedback | `instruction` and `completions` with their scores: the best is chosen, the worst rejected |
| hh | `chosen` and `rejected` as texts of `Human:` and `Assistant:` turns that differ in the last answer |
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ctllm_jax.config.errors import UserError
from ctllm_jax.data.chat import Message
from ctllm_jax.data.conversations import Dropped, kind_of, messages_of, read_rows
from ctllm_jax.dataset.text import checked_value

LAYOUTS = ("trl", "sharegpt", "alpaca", "ultrafeedback", "hh")
_PROMPTS = ("prompt", "question", "query", "instruction")
_EXPECTED = ("chosen + rejected (with prompt, or one beginning), conversations + chosen + rejected, "
             "instruction + output [chosen, rejected], instruction + completions [{response, overall_score}]")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SCORES = ("overall_score", "fine-grained_score")
logger = logging.getLogger(__name__)


class Pair(NamedTuple):
    """A prompt, the answer that was preferred, the one that was not, and where they stood, as in `Dialogue`."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    file: Path
    row: int

    def dialogues(self) -> tuple[list[Message], list[Message]]:
        """The prompt with either answer, the chosen one first."""
        return tuple([*self.prompt, Message("assistant", answer)] for answer in (self.chosen, self.rejected))


class Pairs(NamedTuple):
    """What was read: the pairs, the layout of each file in words, rows read, rows left out by reason."""

    pairs: list[Pair]
    layouts: dict[str, str]
    rows: int
    dropped: dict[str, int]


def read_pairs(path: Path | str, *, layout: str | None = None, max_bad: int = 0) -> Pairs:
    """All pairs of a file, or of the files below a folder in order of their paths.

    A row whose answers are equal but for white space, of which one is empty, or which has no prompt, is dropped and
    counted. A row that cannot be read counts against `max_bad`. UserError where there are more, or where no layout is
    recognized, with the fields that were seen.
    """
    layouts: dict[str, str] = {}
    detected: dict[Path, str] = {}

    def parse(record: dict, file: Path, row: int) -> Pair:
        found = layout or detected.get(file) or detect_layout(record)
        if found is None:
            seen = ", ".join(f"{name} ({kind_of(value)})" for name, value in list(record.items())[:12]) or "none"
            raise UserError(f"{file}:{row}: no known layout of pairs; fields seen: {seen}; needed: {_EXPECTED}")
        if file not in detected:
            detected[file] = found
            layouts[str(file)] = f"{found} ({', '.join(list(record)[:8])})"
            logger.info("%s: %s", file, layouts[str(file)])
        return Pair(*_checked(*_PARSERS[found](record)), file, row)

    read = read_rows(path, parse, max_bad=max_bad)
    if not read.parsed:
        raise UserError(f"{path} holds no pair of different answers ({read.rows} rows, {read.dropped or 'all empty'})")
    return Pairs(read.parsed, layouts, read.rows, read.dropped)


def detect_layout(record: dict[str, Any]) -> str | None:
    """The layout that the fields of a row show, or None."""
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


def _from_trl(record: dict) -> tuple[Sequence[Message], Any, Any]:
    chosen, rejected = _both(record)
    name = next((name for name in _PROMPTS if record.get(name) is not None), None)
    prompt = [] if name is None else _prompt_of(record, name)
    if isinstance(chosen, list) or isinstance(rejected, list):
        sides = [messages_of(side, field) for side, field in ((chosen, "chosen"), (rejected, "rejected"))]
        if all(message.role == "assistant" for side in sides for message in side):
            sides = [prompt + side for side in sides]
        return _split(record, *sides)
    if name is None:
        # What both begin with is the prompt, to the last space before they differ.
        chosen, rejected = checked_value(chosen, "chosen"), checked_value(rejected, "rejected")
        same = next((index for index, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
                    min(len(chosen), len(rejected)))
        same -= chosen[same - 1:same] == " "
        prompt = [Message("user", chosen[:same])]
        chosen, rejected = chosen[same:], rejected[same:]
    return _with_system(record, prompt), chosen, rejected


def _from_sharegpt(record: dict) -> tuple[Sequence[Message], Any, Any]:
    prompt = messages_of(record.get("conversations"), "conversations")
    sides = []
    for name, side in zip(("chosen", "rejected"), _both(record), strict=True):
        if isinstance(side, dict):
            side = [{**side, next((key for key in ("value", "content") if key in side), "value"): _text(side)}]
        sides.append(prompt + messages_of(side, name) if isinstance(side, list)
                     else [*prompt, Message("assistant", side or "")])
    return _split(record, *sides)


def _from_alpaca(record: dict) -> tuple[Sequence[Message], Any, Any]:
    output = record.get("output")
    if not isinstance(output, list):
        raise ValueError(f"field 'output' is not a list of answers but {kind_of(output)}")
    if len(output) < 2:
        raise Dropped("fewer than two answers")
    prompt = []
    for turn in record.get("history") or []:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise ValueError("history must be a list of pairs of question and answer")
        prompt += [Message("user", checked_value(turn[0], "history")),
                   Message("assistant", checked_value(turn[1], "history"))]
    prompt += _prompt_of(record, "instruction")
    return _with_system(record, prompt), output[0], output[1]


def _from_ultrafeedback(record: dict) -> tuple[Sequence[Message], Any, Any]:
    scored = []
    for entry in record.get("completions") or []:
        score = next((entry[name] for name in _SCORES if entry.get(name) is not None), None)
        if not isinstance(score, (int, float)) or isinstance(score, bool):
            raise ValueError(f"a completion has no number under {' or '.join(_SCORES)}")
        scored.append((score, entry.get("response")))
    if len(scored) < 2:
        raise Dropped("fewer than two answers")
    best, worst = max(scored, key=lambda each: each[0]), min(scored, key=lambda each: each[0])
    if best[0] == worst[0]:
        raise Dropped("answers of equal score")
    return _prompt_of(record, "instruction"), best[1], worst[1]


def _from_hh(record: dict) -> tuple[Sequence[Message], Any, Any]:
    sides = []
    for name, text in zip(("chosen", "rejected"), _both(record), strict=True):
        parts = _TURN.split(checked_value(text, name).lstrip())
        if parts[0].strip() or len(parts) < 3:
            raise ValueError(f"field {name!r} does not begin with a turn of Human: or Assistant:")
        roles = {"Human": "user", "Assistant": "assistant"}
        sides.append([Message(roles[who], said.strip()) for who, said in zip(parts[1::2], parts[2::2], strict=True)])
    return _split(record, *sides)


_PARSERS = {"trl": _from_trl, "sharegpt": _from_sharegpt, "alpaca": _from_alpaca, "ultrafeedback": _from_ultrafeedback,
            "hh": _from_hh}


def _both(record: dict) -> tuple[Any, Any]:
    for name in ("chosen", "rejected"):
        if name not in record:
            raise ValueError(f"no field {name!r}; its fields are {', '.join(record) or 'none'}")
    return record["chosen"], record["rejected"]


def _text(message: dict) -> str:
    """An answer that is null is an empty one here."""
    found = message.get("value", message.get("content"))
    return "" if found is None else found


def _prompt_of(record: dict, name: str) -> list[Message]:
    value = record.get(name)
    if isinstance(value, list):
        return messages_of(value, name)
    said = [checked_value(value, name)]
    if name == "instruction" and record.get("input"):
        said.append(checked_value(record["input"], "input"))
    return [Message("user", "\n".join(filter(None, said)))]


def _split(record: dict, chosen: list[Message], rejected: list[Message]) -> tuple[Sequence[Message], str, str]:
    """Two dialogues as the prompt that they share and their last answers."""
    for side in (chosen, rejected):
        if not side or side[-1].role != "assistant":
            raise Dropped("no answer at the end")
    if chosen[:-1] != rejected[:-1]:
        raise Dropped("answers to different prompts")
    return _with_system(record, chosen[:-1]), chosen[-1].content, rejected[-1].content


def _with_system(record: dict, prompt: list[Message]) -> list[Message]:
    system = record.get("system") or record.get("system_prompt")
    if not system or prompt and prompt[0].role == "system":
        return prompt
    return [Message("system", checked_value(system, "system")), *prompt]


def _checked(prompt: Sequence[Message], chosen: Any, rejected: Any) -> tuple[tuple[Message, ...], str, str]:
    """The same, if it can be learned from. An empty system prompt is none."""
    chosen, rejected = ("" if answer is None else checked_value(answer, name)
                        for name, answer in (("chosen", chosen), ("rejected", rejected)))
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
