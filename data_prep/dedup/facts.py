"""Whether two similar lines may state different facts: another number, a negation, an opposite, another order.

The test is cautious: of two lines that only seem to differ in a fact, both stay.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Hashable

_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*|[〇零一二三四五六七八九十百千万亿两半]+")
_NEGATION = re.compile(r"[不没无未非勿莫否]|\b(?:not|no|never|without|neither|nor|cannot|none)\b|n['’]t\b")
_TOKEN = re.compile(r"[a-z]+|\w")
_OPPOSITES = (
    "升降 高低 增减 涨跌 大小 多少 上下 左右 前后 先后 东西 南北 内外 进出 出入 开关 长短 快慢 冷热 早晚 "
    "远近 深浅 轻重 强弱 新旧 老少 男女 买卖 收支 借贷 存取 盈亏 胜负 输赢 攻守 加减 乘除 正反 正负 真假 "
    "对错 好坏 优劣 善恶 生死 阴阳 同异 始终 原被 甲乙 "
    "increase:decrease increased:decreased increases:decreases rise:fall rises:falls rose:fell up:down higher:lower "
    "more:less more:fewer above:below before:after left:right first:last buyer:seller plaintiff:defendant win:lose "
    "won:lost true:false allowed:forbidden open:closed open:close north:south east:west male:female hot:cold on:off "
    "maximum:minimum over:under with:without begin:end start:end always:never")
_PAIRS = [tuple(pair.split(":")) if ":" in pair else tuple(pair) for pair in _OPPOSITES.split()]
_FUNCTION_WORDS = frozenset("的地得了着过也都就在是和与及之而其这那") | {"the", "a", "an", "of", "to", "in", "and"}


@functools.lru_cache(maxsize=1024)
def signature(line: str) -> Hashable:
    """The numbers of a line in their order, and its negations: lines that differ in them state different facts.

    A single 一 is not a number: 这一行 and 这行 are the same.
    """
    line = line.lower()
    return tuple(number for number in _NUMBER.findall(line) if number != "一"), tuple(sorted(_NEGATION.findall(line)))


def differ(a: str, b: str) -> bool:
    """Whether two lines have different signatures, opposite words, or the same words in another order."""
    from rapidfuzz.distance import Levenshtein

    if signature(a) != signature(b):
        return True

    left, right = (_TOKEN.findall(line.lower()) for line in sorted((a, b)))
    removed: Counter[str] = Counter()
    added: Counter[str] = Counter()
    for edit in Levenshtein.opcodes(left, right):
        if edit.tag != "equal":
            removed.update(left[edit.src_start:edit.src_end])
            added.update(right[edit.dest_start:edit.dest_end])
    if (removed & added).keys() - _FUNCTION_WORDS:
        return True
    return any(removed[one] and added[other] or removed[other] and added[one] for one, other in _PAIRS)
