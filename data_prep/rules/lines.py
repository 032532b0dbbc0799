"""S8, S9: what kinds of lines a text is made of. W1 to W5: lines that are taken out of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from data_prep.rules.bad_words import BadWords
from data_prep.rules.registry import rule
from data_prep.rules.view import View

_MORE = ("readmore", "read more", "展开", "更多", "...")
_BULLETS = tuple("•●○■□▪▫※·➢‣▶◀◦–")
_TERMINAL = frozenset('.!?…;"')
_CLOSERS = ")]}>'~*"
_CHINESE = re.compile("[\u2e80-\u312f\u31a0-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff]")
_NEEDLES = {"javascript": "javascript", "lorem_ipsum": "lorem ipsum"}
_THREE = re.compile(r"(?:[^\W_][\W_]*){3}")


@rule("more_line_fraction", "S8", high=0.3, cost=120)
def more_line_fraction(view: View) -> float:
    """Lines that end in readmore (read more), 展开, 更多 or 。。。 / lines that are not empty.

    Looked for in the measured text, where 。。。, ... and … are all three full stops: the teaser of an article.
    """
    if not any(map(view.lowered.__contains__, _MORE)):
        return 0.0
    lines = view.measured_lines
    return sum(line[-9:].lower().endswith(_MORE) for line in lines) / len(lines) if lines else 0.0


@rule("bullet_line_fraction", "S9", high=0.9, cost=110)
def bullet_line_fraction(view: View) -> float:
    """Lines that start with a bullet (•●○■□▪▫※·➢‣▶◀◦–) / lines that are not empty.

    Looked for in the text itself: U2 would make – a hyphen, which is no bullet here.
    """
    if not any(map(view.text.__contains__, _BULLETS)):
        return 0.0
    lines = view.lines
    return sum(line.startswith(_BULLETS) for line in lines) / len(lines) if lines else 0.0


@dataclass(frozen=True)
class LineRule:
    """A rule for lines: its number in CT-LLM's table, what it is, and `keeps(line)` of a measured, stripped line."""

    name: str
    code: str
    doc: str
    keeps: Callable[[str], bool] | None = None


def ends_in_terminal_punctuation(line: str) -> bool:
    """W1 of a measured, stripped line."""
    return line[-1:] in _TERMINAL or line.rstrip(_CLOSERS)[-1:] in _TERMINAL


def has_three_words(line: str) -> bool:
    """W3 of a measured, stripped line."""
    head = line[:3]
    if len(head) == 3 and head.isalnum() and "\u3400" <= head[0] <= "\u9fff":
        return True  # Nine lines of ten.
    if _CHINESE.search(line):
        return _THREE.search(line) is not None
    words = (word for word in line.split() if any(map(str.isalnum, word)))
    return len(list(islice(words, 3))) == 3


LINE_RULES = {line_rule.name: line_rule for line_rule in (
    LineRule("terminal_punctuation", "W1",
             'The line ends in . ! ? … ; or a quotation mark, so also in 。！？；“” and 」, or in one of these and '
             "closing brackets.", ends_in_terminal_punctuation),
    LineRule("javascript", "W2", 'No "javascript" in the line.', lambda line: "javascript" not in line.lower()),
    LineRule("three_words", "W3",
             "At least three words: in a line with Chinese, Japanese or Korean characters these are letters and "
             "digits, in any other the pieces between blanks that hold one.", has_three_words),
    LineRule("lorem_ipsum", "W4", 'No "lorem ipsum" in the line.', lambda line: "lorem ipsum" not in line.lower()),
    LineRule("bad_words", "W5", "None of the bad words in the line (needs filter.bad_words)."),
)}


def drop_lines(view: View, names: Sequence[str], bad_words: BadWords | None = None) -> tuple[str, dict[str, int]]:
    """The text of a view without the lines that break one of the named rules, and how many broke each, as the first.

    Empty lines stay, but for those directly after a line that goes. Idempotent.
    """
    text, measured, lowered = view.text, view.measured, view.lowered
    bad = bad_words.lines(lowered) if bad_words is not None and "bad_words" in names else ()
    # Most documents hold no javascript at all: then no line is asked.
    tests = [(name, LINE_RULES[name].keeps) for name in LINE_RULES if name in names and name != "bad_words"
             and (name not in _NEEDLES or _NEEDLES[name] in lowered)]
    if not tests and not bad:
        return text, {}
    kept, removed, after_gap = [], dict.fromkeys(names, 0), False
    for number, (line, raw) in enumerate(zip(map(str.strip, measured.split("\n")), text.split("\n"), strict=True)):
        if not line:
            if not after_gap:
                kept.append(raw)
            continue
        flaw = "bad_words" if number in bad else None
        for name, keeps in tests:
            if not keeps(line):
                flaw = name
                break
        after_gap = flaw is not None
        if after_gap:
            removed[flaw] += 1
        else:
            kept.append(raw)
    removed = {name: count for name, count in removed.items() if count}
    return ("\n".join(kept), removed) if removed else (text, {})
