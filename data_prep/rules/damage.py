"""E1 to E4: text that lost its characters on the way here, or was decoded with the wrong character set."""

from __future__ import annotations

import re

import numpy as np

from data_prep.rules.registry import linear, rule
from data_prep.rules.view import RARE, View

_EDGES = linear(0, 0.5)
_RARE_SHARE = 0.05
_PRIVATE = re.compile(r"(?<=\w)[\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd]+(?=\w)")
_FILLERS = ("锟斤", "斤拷", "烫烫烫烫", "屯屯屯屯")
_FILLED = re.compile("锟斤拷|烫{4,}|屯{4,}|锟斤|斤拷")
_HIGH = re.compile("[\u0080-\u00ff\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2022\u2026\u2030"
                   "\u2039\u203a\u20ac\u2122]{2,}")
_WIDE = re.compile("[^\x00-\x7f]{4,}")
_UTF8 = re.compile(rb"(?:[\xc2-\xdf][\x80-\xbf]|[\xe1-\xef][\x80-\xbf]{2}|\xf0[\x90-\xbf][\x80-\xbf]{2})+")
_UTF8_CHINESE = re.compile(rb"(?:[\xe2-\xe9\xef][\x80-\xbf]{2}){2,}")
_GB2312 = re.compile(rb"(?:[\xa1-\xa3\xb0-\xf7][\xa1-\xfe]){2,}")
_ESCAPES = re.compile(r"\\u[0-9A-Fa-f]{4}|\\x[0-9A-Fa-f]{2}|&#?\w{2,8};|(?:[%=][89A-Fa-f][0-9A-Fa-f]){2,}")


@rule("replacement_fraction", "E1", high=0.01, cost=42, edges=_EDGES, language="any", domain="any")
def replacement_fraction(view: View) -> float:
    """U+FFFD, and private-use characters between letters, / characters: each stands for a lost character."""
    count = view.text.count("\ufffd")
    if view.hidden:
        count += sum(map(len, _PRIVATE.findall(view.text)))
    return min(1.0, count / view.length) if view.length else float(count > 0)


@rule("question_mark_fraction", "E2", high=0.15, cost=51, edges=_EDGES, language="any")
def question_mark_fraction(view: View) -> float:
    """Question marks (? and ？) / characters: a lossy encoder writes one for each character that it does not have."""
    return view.measured.count("?") / view.length if view.length else 0.0


@rule("mojibake_fraction", "E3", high=0.02, cost=55, edges=_EDGES, language="any", domain="any")
def mojibake_fraction(view: View) -> float:
    """Share of the characters that come from decoding with the wrong character set.

    These are UTF-8 read as Windows-1252, GB18030, Big5 or Shift-JIS, GB2312 read as Latin-1, and 锟斤拷, 烫烫烫烫 and
    屯屯屯屯. Chinese text is searched for the other ones only where 5 % of its characters are rare.
    """
    if not view.length:
        return 0.0
    text, count = view.text, 0.0
    if any(map(text.__contains__, _FILLERS)):
        text = _FILLED.sub("", text)
        count += len(view.text) - len(text)
    rare = int(np.count_nonzero(view.flags & RARE)) >= _RARE_SHARE * view.length
    if rare or bool((view.codes - np.uint32(0xC0) < 0x40).any()):
        for found in _HIGH.findall(text):
            data = b"".join(map(_windows_1252, found))
            count += max(_matched(_UTF8, data), _matched(_GB2312, data))
    if rare:
        wide = "\n".join(_WIDE.findall(text))
        read_as = (wide.encode(encoding, "replace") for encoding in ("gb18030", "big5", "cp932"))
        count += max(_matched(_UTF8_CHINESE, data) for data in read_as) / 2
    return min(1.0, count / view.length)


@rule("escape_fraction", "E4", high=0.1, cost=44, edges=_EDGES, language="any")
def escape_fraction(view: View) -> float:
    r"""Share of the characters in escapes that were not decoded: \u4f60, \xe4, &#20320; and &nbsp;, %E4%BD, =E4=BD."""
    if not view.length or not any(map(view.text.__contains__, ("\\u", "\\x", "&", "%", "="))):
        return 0.0
    return min(1.0, sum(map(len, _ESCAPES.findall(view.text))) / view.length)


def _matched(pattern: re.Pattern, data: bytes) -> int:
    """Bytes of `data` in matches of a pattern."""
    return sum(map(len, pattern.findall(data)))


def _windows_1252(character: str) -> bytes:
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:
        return character.encode("latin-1", "replace")
