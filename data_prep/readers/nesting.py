"""How much work a page's HTML makes, from its tags alone, before a parser sees it."""

from __future__ import annotations

import re

_TAG = re.compile(r"<(/?)([a-zA-Z][^\s/>]*)")
_VOID = frozenset("area base basefont bgsound br col embed frame hr img input keygen link meta param source track wbr"
                  .split())
# Their end tags are optional: one of them ends where the next begins, so that they nest only inside other elements.
_ENDED_BY_OTHERS = frozenset("p li dd dt option td th tr tbody thead tfoot caption colgroup html head body".split())
# A parser opens these again in every block that follows, as long as they are not closed.
_FORMATTING = frozenset("a b big code em font i nobr s small strike strong tt u".split())
# An end tag closes nothing beyond these.
_BOUNDARIES = frozenset("applet marquee object table template svg math".split())
# The end tag of anything else, apart from formatting, closes nothing beyond one of these.
_BLOCKS = frozenset("""address article aside blockquote button center details dir div dl fieldset figcaption figure
    footer form frameset h1 h2 h3 h4 h5 h6 header hgroup iframe listing main menu nav noembed noframes noscript ol pre
    plaintext script search section select style summary textarea title ul xmp""".split())
_LOOK_BACK = 64
_ELEMENTS = {"resiliparse": 500_000, "trafilatura": 100_000}
_STEPS = {"resiliparse": 10_000_000, "trafilatura": 2_000_000}
"""Both parsers look at the ancestors of each element. On one core, the most that is allowed takes some 10 s."""


def check_nesting(html: str, extractor: str) -> None:
    """ValueError where a page has more elements, or deeper ones, than its extraction can take in some seconds.

    A few hundred kilobytes of tags that are never closed take minutes and gigabytes otherwise. This is counted, and not
    measured as time, so that every machine keeps the same pages; `record_seconds` is a second limit, far above it.
    """
    elements, steps, deepest = _work(html)
    if elements > _ELEMENTS[extractor] or steps > _STEPS[extractor]:
        raise ValueError(f"the HTML has {elements:,} elements, up to {deepest:,} inside one another: more than is read")


def _work(html: str) -> tuple[int, int, int]:
    """Elements, the sum of their ancestors, and the most ancestors of one; rather too many than too few."""
    elements = steps = deepest = formatting = 0
    opened: list[str] = []
    for match in _TAG.finditer(html):
        name = match[2].lower()
        if name in _ENDED_BY_OTHERS or name in _VOID:
            if not match[1]:
                elements += 1 + formatting
                steps += (1 + formatting) * len(opened)
        elif not match[1]:
            elements += 1 + formatting
            steps += (1 + formatting) * len(opened)
            formatting += name in _FORMATTING
            opened.append(name)
            deepest = max(deepest, len(opened))
        elif (place := _closed(opened, name)) is not None:
            formatting -= name in _FORMATTING
            del opened[place]
    return elements, steps, deepest


def _closed(opened: list[str], name: str) -> int | None:
    """The place of the element that an end tag closes, if it surely does."""
    inline = name not in _BLOCKS and name not in _FORMATTING
    for place in range(len(opened) - 1, max(-1, len(opened) - 1 - _LOOK_BACK), -1):
        other = opened[place]
        if other == name:
            return place
        if other in _BOUNDARIES or inline and other in _BLOCKS:
            return None
    return None
