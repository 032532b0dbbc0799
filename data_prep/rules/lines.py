"""S8, S9: what kinds of lines a text is made of. W1 to W5: lines that are taken out of it."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

from data_prep.rules.bad_words import BadWords
from data_prep.rules.registry import rule
from data_prep.rules.view import View, trailing

_MORE = ("readmore", "read more", "展开", "更多", "...")
_BULLETS = tuple("•●○■□▪▫※·➢‣▶◀◦–")
_TERMINAL = frozenset('.!?…;"')
_CLOSERS = ")]}>'~*"
_NOTE = re.compile(r"(?:\([^()]{0,40}\)|\[[^\[\]]{0,40}\])$")
_MARKER = re.compile(r"(?:[-*+]\s|\(?(?:\d{1,3}|[a-zA-Z]|[一二三四五六七八九十百]{1,4})[.,):]|第.{1,4}[章节回条])")
_BLOCK, _ITEM, _FULL = 4, 4, 20
"""Thresholds: at least this many lines without a final mark can be verse, a list or a table, if they have more than
this many letters and digits on average, because menus have fewer. A line of at least this many characters that is
hardly shorter than the next one was wrapped."""
_TAIL = 200
"""Characters at the end of a line in which its last mark is looked for."""
_OF_BLOCKS = _MARK, _WORDS = "terminal_punctuation", "three_words"
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


@rule("bullet_line_fraction", "S9", high=0.9, cost=110, version=2)
def bullet_line_fraction(view: View) -> float:
    """Lines that start with a bullet (•●○■□▪▫※·➢‣▶◀◦–) and are no list's / lines that are not empty.

    Looked for in the text itself: U2 would make – a hyphen, which is no bullet here. A line with more than four letters
    and digits is an item of a list, and does not count; published: it does.
    """
    if not any(map(view.text.__contains__, _BULLETS)):
        return 0.0
    pairs = zip(view.text.split("\n"), view.measured.split("\n"), strict=True)
    lines = [(line.strip(), measured) for line, measured in pairs if measured.strip()]
    count = sum(line.startswith(_BULLETS) and (view.published or _weight(measured) <= _ITEM)
                for line, measured in lines)
    return count / len(lines) if lines else 0.0


@dataclass(frozen=True)
class LineRule:
    """A rule for lines: its number in CT-LLM's table, what it is, and `keeps(line)` of a measured, stripped line."""

    name: str
    code: str
    doc: str
    keeps: Callable[[str], bool] | None = None


def ends_in_terminal_punctuation(line: str) -> bool:
    """W1 of a measured, stripped line, as published."""
    return line[-1:] in _TERMINAL or line.rstrip(_CLOSERS)[-1:] in _TERMINAL


def ends_a_sentence(line: str, raw: str = "") -> bool:
    """W1 of a measured, stripped line, which was `raw`: its last mark, whatever note, picture or bracket follows it."""
    if ends_in_terminal_punctuation(line):
        return True
    line = line[-_TAIL:]
    head = _before_notes(line)
    if head[-1:] not in _TERMINAL and unicodedata.category(raw.rstrip()[-1:] or " ") == "No":
        # A note's number, such as ① or ², which NFKC makes a digit.
        head = _before_notes(line.rstrip("0123456789"))
    return head[-1:] in _TERMINAL


def _before_notes(line: str) -> str:
    """A line without the notes, closing brackets, quotation marks and emoji after its last punctuation mark."""
    while line and line[-1] not in _TERMINAL:
        note = _NOTE.search(line)
        if note is None and line[-1] not in trailing():
            break
        line = line[:note.start()] if note else line[:-1]
    return line


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
    LineRule(_MARK, "W1",
             'The line ends in . ! ? … ; or a quotation mark, so also in 。！？；“” and 」, or in one of these and '
             "closing brackets, notes such as [1] and （图）, or emoji; or it is wrapped, or belongs to verse, a list "
             "or a table. Published: in one of these and closing brackets.", ends_a_sentence),
    LineRule("javascript", "W2", 'No "javascript" in the line.', lambda line: "javascript" not in line.lower()),
    LineRule(_WORDS, "W3",
             "At least three words: in a line with Chinese, Japanese or Korean characters these are letters and "
             "digits, in any other the pieces between blanks that hold one.", has_three_words),
    LineRule("lorem_ipsum", "W4", 'No "lorem ipsum" in the line.', lambda line: "lorem ipsum" not in line.lower()),
    LineRule("bad_words", "W5", "None of the bad words in the line (needs filter.bad_words)."),
)}


def drop_lines(view: View, names: Sequence[str], bad_words: BadWords | None = None) -> tuple[str, dict[str, int]]:
    """The text of a view without the lines that break one of the named rules, and how many broke each, as the first.

    Empty lines and separators stay, but for those directly after a line that goes. Idempotent.
    """
    text, measured, lowered = view.text, view.measured, view.lowered
    bad = bad_words.lines(lowered) if bad_words is not None and "bad_words" in names else ()
    # Most documents hold no javascript at all: then no line is asked.
    tests = [(name, LINE_RULES[name].keeps) for name, needle in _NEEDLES.items() if name in names and needle in lowered]
    blocks = [name for name in _OF_BLOCKS if name in names]
    if not tests and not bad and not blocks:
        return text, {}
    raws, flaws = text.split("\n"), {}
    lines = {number: line for number, line in enumerate(map(str.strip, measured.split("\n"))) if line}
    if tests or bad:
        for number, line in lines.items():
            flaw = "bad_words" if number in bad else next((name for name, keeps in tests if not keeps(line)), None)
            if flaw is not None:
                flaws[number] = flaw
    if blocks:
        asked = {number: line for number, line in lines.items() if number not in flaws} if flaws else lines
        flaws |= _flaws_of_blocks(asked, raws, lines, blocks, published=view.published)
    if not flaws:
        return text, {}
    kept, after_gap = [], False
    for number, raw in enumerate(raws):
        if number not in flaws and (number in lines or not after_gap):
            kept.append(raw)
        after_gap = number in flaws or after_gap and number not in lines
    counts = Counter(flaws.values())
    return "\n".join(kept), {name: counts[name] for name in names if counts[name]}


def _flaws_of_blocks(lines: Mapping[int, str], raws: Sequence[str], filled: Container[int], names: Sequence[str], *,
                     published: bool) -> dict[int, str]:
    """The lines that violate W1 or W3: {line number: name of the rule}; `filled`: numbers of all non-empty lines.

    Published: each line is asked alone. Else a line without a final mark stays if the next one continues it, or if it
    belongs to verse, a list or a table.
    """
    flaws: dict[int, str] = {}
    marked: dict[int, bool] = {}
    for number, line in lines.items():
        ends = (_MARK not in names or
                (ends_in_terminal_punctuation(line) if published else ends_a_sentence(line, raws[number])))
        if published and not ends:
            flaws[number] = _MARK
        elif ends and _WORDS in names and not has_three_words(line):
            flaws[number] = _WORDS
        else:
            marked[number] = ends
    if all(marked.values()):
        return flaws
    below = None
    for number in reversed(marked):
        if not marked[number] and below is not None and marked[below]:
            line = lines[number]
            full = number + 1 in filled and len(line) >= max(_FULL, 0.8 * len(lines[below]))
            marked[number] = full or line[-1] in ",:"
        below = number
    loose = [number for number in marked if not marked[number]]
    prose = sum(len(lines[number]) for number in marked if marked[number])
    if 4 * prose > sum(len(lines[number]) for number in loose) or not _holds_text([lines[number] for number in loose]):
        for is_marked, run in groupby(marked, marked.__getitem__):
            numbers = list(run)
            if not is_marked and not (
                    2 * sum(_is_item(lines[number], raws[number]) for number in numbers) > len(numbers)
                    and _holds_text([lines[number] for number in numbers])):
                flaws |= dict.fromkeys(numbers, _MARK)
    return flaws


def _holds_text(lines: Sequence[str]) -> bool:
    """Whether lines without a final mark may be verse, a list or a table: no menu, and not the same line again."""
    return (len(lines) >= _BLOCK and sum(map(_weight, lines)) > _ITEM * len(lines)
            and 2 * len(set(lines)) >= len(lines))


def _is_item(line: str, raw: str) -> bool:
    """Whether a line is an item of a list or a row of a table."""
    return "|" in line or "\t" in raw.strip() or _MARKER.match(line) is not None or raw.lstrip().startswith(_BULLETS)


def _weight(line: str) -> int:
    """Letters and digits of a line with Chinese characters; of any other one two for each word."""
    if _CHINESE.search(line):
        return sum(map(str.isalnum, line))
    return 2 * sum(any(map(str.isalnum, word)) for word in line.split())
