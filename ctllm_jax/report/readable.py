"""Numbers, times and text as people read them: on the page, and on the console."""

from __future__ import annotations

import math
import re
import time

from ctllm_jax.config.control import visible as visible

_SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def compact(value: float) -> str:
    """Three digits and a scale: 950, 12.3k, 4.56M, 2.13B, 1.25T."""
    for scale, letter in _SCALES:
        if abs(value) >= scale * 0.9995:
            return f"{_three_digits(value / scale)}{letter}"
    return f"{value:,.0f}" if value == int(value) else _three_digits(value)


def trimmed(value: float) -> str:
    """Like compact, without trailing zeros: 2k, 1.5k, 0.25."""
    text = compact(value)
    number = text.rstrip("TBMk")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + text[len(number):]


def _three_digits(value: float) -> str:
    size = abs(value)
    if size >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """Two units: 0.8s, 41s, 3m12s, 2h05m, 3d04h."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for size, unit, part, part_unit in ((86_400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{part_unit}"
    return f"{whole}s"


def clock(seconds: float) -> str:
    """Unix seconds as a date and time in UTC, or a dash if no calendar has them."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (OverflowError, OSError, ValueError):
        return "–"


def percent(share: float) -> str:
    """A share of 1 as 41.2%."""
    return f"{share * 100:.1f}%"


def as_markdown(text: str) -> str:
    """The text on one line of Markdown, or in a cell of a table, in which it is nothing but text: no HTML, no link."""
    return re.sub(r"([\\`*_|<>]|\](?=[(\[:]))", r"\\\1", " ".join(visible(text).split()))


def finite(value: object) -> float | None:
    """The value as a float, or None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
