"""Parse a judge's reply: one rating from 1 to 10, or one of A, B and C; nothing if it is ambiguous.

Only the judge's own statements count. Thoughts (`<think>`), quotations, code and quoted lines are left out, and so are
sentences that give an example or a condition. Of the ratings that are left those of the highest rank count:

  1. one that is called final or overall (`最终评分：8`)
  2. one on a line of its own (`评分：[[8]]`, `**评分**：8/10`, `[[8]]`), before the reasons or after them
  3. `评分：[[8]]` in a sentence
  4. `[[8]]` in a sentence
  5. `评分：8` in a sentence (得分, 打分, 分数, 总分, rating, score)

If these differ, or one of them is no number from 1 to 10 (`[[100]]`, `[[7-8]]`, `3/5`), the reply has no rating, and
the judge is asked again. Numbers may be fullwidth, Chinese (`八`, `七点五`), or out of ten (`8/10`). MT-Bench's own
reader takes the first bracket, and any number in it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator

LOWEST, HIGHEST = 1.0, 10.0

_DIGITS = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {"两": 2}
_HAN = "零一二两三四五六七八九十"
_LABEL = r"(?:评分|得分|打分|分数|总分|rating|score)"
_FINAL = r"(?P<final>(?:最终|最后|综合|总体|总的?|整体|final|overall)\s*)?"
_IS = r"\s*[\"']?\s*(?::|为|是|\bis\b|=)\s*[\"']?\s*"
_VALUE = rf"(?P<value>[-+]?\d+(?:\.\d+)?|[{_HAN}]+(?:点[{_HAN}]+)?)"
_OF = r"(?:\s*分)?(?:\s*(?:/|out\s+of)\s*(?P<of>\d+(?:\.\d+)?)(?:\s*分)?)?"
_END = rf"(?![\w.]{{0,99}}\d|[{_HAN}]|分?[\u4e00-\u9fff]|\s*[-–—~/至到]\s*[\d{_HAN}])"
_OPEN, _CLOSE = r"(?:\[\[|【【)\s*", r"\s*(?:\]\]|】】)"
_NUMBER = re.compile(_VALUE + _OF)
_LOOKS_NUMERIC = re.compile(rf"[-+]?[\d{_HAN}][\d{_HAN}.点分半/~–—到至\s-]*(?:out of \d+)?")
_LINE = re.compile(rf"(?:我的|本次)?{_FINAL}(?:(?P<label>{_LABEL}){_IS})?(?P<bracket>\[\[|【【)?[\[(]?\s*"
                   rf"(?:{_LABEL}{_IS})?(?P<number>[^\[\]【】()]+?)\s*[\])】]*", re.IGNORECASE)
_BRACKETS = re.compile(rf"{_FINAL}(?P<label>{_LABEL}(?:{_IS})?)?{_OPEN}(?:{_LABEL}{_IS})?"
                       rf"(?P<number>[^\[\]【】]*?){_CLOSE}", re.IGNORECASE)
_WORDS = re.compile(rf"{_FINAL}{_LABEL}{_IS}[\[【(]*\s*(?P<number>{_VALUE}{_OF}){_END}", re.IGNORECASE)
_VERDICT = re.compile(rf"{_OPEN}(?P<letter>[A-Z]){_CLOSE}")
_VERDICT_LINE = re.compile(rf"(?P<final>最终|最后)?(?:结论|判断|选择|verdict)?(?:{_IS})?{_VERDICT.pattern}",
                           re.IGNORECASE)

_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_QUOTED = re.compile("“[^”]*”|‘[^’]*’|「[^」]*」|『[^』]*』|\"[^\"\n]*\"|`[^`\n]*`")
_ASIDE = re.compile(r"如果|假如|假设|倘若|要是|若(?:是|能|要|将)|原本|本可|例如|比如|譬如|示例|形如"
                    r"|格式(?:为|是|如|:|\s*$)|\bif\b|(?<!\bI )\bwould\b|\bwould have\b|\bcould\b|e\.g\."
                    r"|example|format", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[。!?;\n]|\.\s")
_LONGEST_SENTENCE = 2000
"""Characters before a rating in which its sentence is looked for: otherwise the time grows with their square."""
_AROUND = " \t#-_|`\"'“”「」『』{},。.!;"


def read_rating(reply: str) -> float | None:
    """The rating of a reply; None if there is none, or it is ambiguous."""
    text = _said(reply)
    fields = _json(text)
    if fields is not None:
        return _certain([(1, _rating(str(value))) for name, value in fields.items()
                         if re.fullmatch(_LABEL, name, re.IGNORECASE)])
    found, sentences = [], []
    lines = _lines(text)
    for line in lines:
        match = _LINE.fullmatch(line.strip(_AROUND))
        rating = match and _rating(match["number"])
        if match and _LOOKS_NUMERIC.fullmatch(match["number"]) and (
                match["label"] or match["bracket"] or len(lines) == 1 or rating and re.search("/|out of", line)):
            found.append((0 if match["final"] else 1, rating))
        else:
            sentences.append(line)
    rest = _without_quotations("\n".join(sentences))
    for match in _spoken(_BRACKETS, rest):
        if _LOOKS_NUMERIC.fullmatch(match["number"]):
            found.append((0 if match["final"] else 2 if match["label"] else 3, _rating(match["number"])))
    for match in _spoken(_WORDS, rest):
        found.append((0 if match["final"] else 4, _rating(match["number"])))
    return _certain(found)


def read_verdict(reply: str) -> str | None:
    """A, B or C (a tie), in double brackets; None if there is none, or it is ambiguous."""
    found, sentences = [], []
    for line in _lines(_said(reply)):
        match = _VERDICT_LINE.fullmatch(line.strip(_AROUND))
        if match:
            found.append((0 if match["final"] else 1, match["letter"]))
        else:
            sentences.append(line)
    found += [(2, match["letter"]) for match in _spoken(_VERDICT, _without_quotations("\n".join(sentences)))]
    return _certain([(rank, letter if letter in ("A", "B", "C") else None) for rank, letter in found])


def _said(reply: str) -> str:
    """The reply without thoughts, in plain digits and brackets. It may begin inside of a thought."""
    text = _THOUGHT.sub("", unicodedata.normalize("NFKC", reply)).replace("*", "")
    text = re.sub(r"[^\S\n]+", " ", text)  # patterns with several gaps would try every way to share out a long one
    return re.split("</think(?:ing)?>", text, flags=re.IGNORECASE)[-1].strip()


def _lines(text: str) -> list[str]:
    """Lines of the judge's own text, without code and quotations."""
    return [line for line in _FENCE.sub("", text).splitlines() if line.strip() and not line.lstrip().startswith(">")]


def _json(text: str) -> dict | None:
    """The reply as a JSON object, with or without a code block; None if it is not one."""
    try:
        found = json.loads(re.sub(r"\A```(?:json)?", "", text).removesuffix("```"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _without_quotations(text: str) -> str:
    for opening, closing in ("“”", "‘’", "「」", "『』"):
        # The search for the end of a quotation that has none takes the square of the time.
        end = text.rfind(closing) + 1
        text = text[:end] + text[end:].replace(opening, "\0")
    return _QUOTED.sub("", text)


def _spoken(pattern: re.Pattern, text: str) -> Iterator[re.Match]:
    """Matches that are not in an example or after a condition."""
    for match in pattern.finditer(text):
        sentence = _SENTENCE_END.split(text[max(0, match.start() - _LONGEST_SENTENCE):match.start()])[-1]
        if not _ASIDE.search(sentence):
            yield match


def _rating(number: str) -> float | None:
    """The written number from 1 to 10; None for other numbers and ranges."""
    match = _NUMBER.fullmatch(number.strip())
    if match is None or match["of"] is not None and float(match["of"]) != HIGHEST:
        return None
    value = _han(match["value"]) if match["value"][0] in _HAN else float(match["value"])
    return value if value is not None and LOWEST <= value <= HIGHEST else None


def _han(text: str) -> float | None:
    """A Chinese numeral up to ten: 八, 十, 七点五."""
    whole, _, part = text.partition("点")
    if whole == "十" and set(part) <= {"零"}:
        return 10.0
    if len(whole) != 1 or not set(whole + part) <= set(_DIGITS):
        return None
    return float(f"{_DIGITS[whole]}.{''.join(str(_DIGITS[digit]) for digit in part) or 0}")


def _certain(found: list[tuple[int, float | str | None]]) -> float | str | None:
    """The rating that all matches of the highest rank agree on."""
    highest = min((rank for rank, _ in found), default=None)
    values = {value for rank, value in found if rank == highest}
    return values.pop() if len(values) == 1 else None
