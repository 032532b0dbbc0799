"""Control characters that can affect a terminal or a shell, or mislead a reader."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

HALF = "half of a surrogate pair (\\ud800 to \\udfff), which is no character"

# C0 and C1 but tab and line feed, DEL, and lone surrogates, which no UTF-8 file can hold.
_STEERING = "\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"
_DIRECTIONS = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_PROGRAM = re.compile(r"(?<![\w./])(?:python )?launch\.py(?= )")
_SHOWN = re.compile(f"[{_STEERING}{_DIRECTIONS}]")
_NOT_IN_A_LINE = re.compile(f"[{_STEERING}{_DIRECTIONS}\t\n\u2028\u2029]")
_NOT_IN_PROSE = re.compile(f"(?!\r)[{_STEERING}]")


def visible(text: str) -> str:
    """Replace every control or invisible character of a text by a visible one."""
    return _SHOWN.sub(_picture, text)


def as_started(text: str) -> str:
    """A text whose commands begin with the program that this process was started as: `ctllm` where the package is
    installed, `python -m ctllm_jax`, or `python launch.py` as they are written."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py" and program.parent.name == "ctllm_jax":
        return _PROGRAM.sub("python -m ctllm_jax", text)
    return _PROGRAM.sub("ctllm", text) if program.stem == "ctllm" else text


def find_control(text: str, *, prose: bool) -> str | None:
    """The first character that a config value may not contain; prose may contain tabs, line ends and direction
    marks."""
    found = (_NOT_IN_PROSE if prose else _NOT_IN_A_LINE).search(text)
    return found and found.group()


def holds_surrogate(value: Any) -> bool:
    """Whether a text in JSON's values cannot be encoded in UTF-8, as tokenizers and files require."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return True
    return False


def _picture(match: re.Match) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "\ufffd"
