"""Text to text: what is measured (NFKC, then U2: punctuation as ASCII), separators, traditional characters.

U2 is one code point to one, so that positions and lines of the NFKC text and of the measured text are the same.
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata

import numpy as np

from ctllm_jax.config.errors import UserError

PUNCTUATION = {
    "。": ".", "｡": ".", "．": ".", "﹒": ".", "，": ",", "、": ",", "､": ",", "﹐": ",", "﹑": ",",
    "：": ":", "∶": ":", "﹕": ":", "；": ";", "﹔": ";", "？": "?", "﹖": "?", "！": "!", "﹗": "!",
    "“": '"', "”": '"', "„": '"', "‟": '"', "〝": '"', "〞": '"', "〟": '"', "＂": '"', "«": '"', "»": '"',
    "「": '"', "」": '"', "『": '"', "』": '"', "｢": '"', "｣": '"', "《": '"', "》": '"',
    "‘": "'", "’": "'", "‚": "'", "‛": "'", "´": "'", "＇": "'", "〈": "<", "〉": ">", "＜": "<", "＞": ">",
    "（": "(", "）": ")", "〔": "[", "〕": "]", "【": "[", "】": "]", "〖": "[", "〗": "]", "［": "[", "］": "]",
    "｛": "{", "｝": "}", "–": "-", "—": "-", "―": "-", "━": "-", "－": "-", "～": "~", "〜": "~", "％": "%",
    "＃": "#", "＄": "$", "＆": "&", "＊": "*", "＋": "+", "／": "/", "＝": "=", "＠": "@", "＼": "\\", "＾": "^",
    "＿": "_", "｀": "`", "｜": "|",
}
"""U2: full-width, CJK and typographic punctuation, and the ASCII mark that stands for each.

After the table of CCNet (Wenzek et al. 2020), which the released corpus follows, with three differences: each mark
becomes exactly one character, so — is "-" without blanks around it and … stays; the digit １ is no quotation mark.
"""

_RULE_LINE, _RULER, _LEADER = 3, 5, 13
"""How many marks are a separator: as a line, as equal ones inside a line, as full stops there (two …… are twelve)."""
_SIZE = sys.maxunicode + 1
_NOT_ALONE = 0xFFFFFFFF
_TABLED = 0x30000  # Planes 0 to 2 hold all text; anything beyond goes through unicodedata.


def without_surrogates(text: str) -> tuple[str, int]:
    """The text with each lone surrogate as U+FFFD, and how many there were. No encoder or tokenizer takes them."""
    if text.isascii():
        return text, 0
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return re.subn("[\ud800-\udfff]", "\ufffd", text)
    return text, 0


def normalize_punctuation(text: str) -> str:
    """U2: `PUNCTUATION` applied. Idempotent, and of the same length."""
    if text.isascii():
        return text
    for mark, ascii_mark in PUNCTUATION.items():
        # 60 searches are ten times as fast as one str.translate: 470 against 50 MB/s.
        text = text.replace(mark, ascii_mark)
    return text


def code_points(text: str) -> np.ndarray:
    """Code points of a text, uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def from_code_points(codes: np.ndarray) -> str:
    """The text of code points; `code_points` backwards."""
    return codes.tobytes().decode("utf-32-le", "surrogatepass")


@functools.cache
def _table() -> np.ndarray:
    """By code point: U2(NFKC), or `_NOT_ALONE`, uint32 [0x110000].

    The table serves where NFKC is one code point in every context: where it is no mark and no conjoining jamo, which
    may join with a neighbour.
    """
    table = np.arange(_SIZE, dtype=np.uint32)
    table[_TABLED:] = _NOT_ALONE
    for code in range(_TABLED):
        if 0x3400 <= code < 0xA000 or 0xAC00 <= code < 0xD7A4 or 0x20000 <= code < 0x2F800:
            continue
        normal = unicodedata.normalize("NFKC", chr(code))
        alone = len(normal) == 1 and unicodedata.category(normal)[0] != "M" and not "\u1100" <= normal <= "\u11ff"
        table[code] = ord(PUNCTUATION.get(normal, normal)) if alone else _NOT_ALONE
    return table


def measured_code_points(text: str) -> np.ndarray:
    """Code points of U2(NFKC(text)), uint32: what the rules look at. 8 times as fast as unicodedata on Chinese."""
    # … is the one common character that becomes several.
    codes = _table()[code_points(text.replace("…", "..."))]
    if (codes == _NOT_ALONE).any():
        return code_points(normalize_punctuation(unicodedata.normalize("NFKC", text)))
    return codes


@functools.cache
def separators() -> frozenset[str]:
    """The characters that separators are drawn with: symbols, dashes, and the marks * # . · • | : / \\ among others."""
    found = {chr(code) for code in (*range(0x3400), *range(0xA000, 0xAC00), *range(0xFE00, 0x20000))
             if unicodedata.category(chr(code)) in ("So", "Sm", "Sk", "Pd", "Pc")}
    return frozenset(found.union("*#.·•‧∙・…:/\\※＊＃．") - {"\ufffd"})


@functools.cache
def _line_starts() -> frozenset[str]:
    return separators() | {chr(code) for code in range(0x3100) if chr(code).isspace()}


@functools.cache
def _shortest_runs() -> np.ndarray:
    """By code point: how many equal ones are a separator inside a line, int64 [0x110000]."""
    table = np.full(_SIZE, np.iinfo(np.int64).max)
    table[code_points("".join(separators()))] = _RULER
    table[code_points(".…．")] = _LEADER
    return table


def without_separators(text: str, codes: np.ndarray | None = None) -> str:
    """The text without lines of `separators` alone (three and more), and with a blank for each run of five equal ones.

    The line break of such a line stays. Of full stops thirteen are a run. A text without separators is returned as is.
    `codes`: the code points of the text, if they are known.
    """
    marks, first, lines = separators(), _line_starts(), text.split("\n")
    # Hardly a line begins with a mark or a blank and ends with one.
    found = [number for number, line in enumerate(lines) if line[:1] in first and line[-1] in first
             and marks.issuperset(bare := "".join(line.split())) and len(bare) >= _RULE_LINE]
    for number in found:
        lines[number] = ""
    cleaned = "\n".join(lines) if found else text
    if found or codes is None:
        codes = code_points(cleaned)
    same = codes[1:] == codes[:-1]
    if len(same) < _RULER - 1 or not (same[:-3] & same[1:-2] & same[2:-1] & same[3:]).any():
        return cleaned
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    lengths = np.diff(starts, append=len(codes))
    runs = lengths >= _shortest_runs()[codes[starts]]
    if not runs.any():
        return cleaned
    codes = np.where(np.repeat(runs, lengths), np.uint32(ord(" ")), codes)
    keep = ~np.repeat(runs, lengths)
    keep[starts[runs]] = True
    return from_code_points(codes[keep])


@functools.cache
def _converter():
    try:
        import opencc
    except ImportError:
        raise UserError("filter.simplify=true and decontaminate.files need the package opencc: pip install "
                        "'ctllm-jax[prep]'") from None
    return opencc.OpenCC("t2s")


def simplify(text: str) -> str:
    """Traditional characters as simplified ones (opencc t2s); a text without any stays as it is."""
    return text if text.isascii() else _converter().convert(text)
