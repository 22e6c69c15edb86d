"""Text and figures as a report shows them: numbers, intervals, and characters that are not safe.

What a model wrote is shown, never obeyed. HTML's own characters are escaped where the page is made
(page.py); here are the characters that escaping leaves alone and that still do harm:

    control characters    NUL and its like are not allowed in HTML
    bidirectional marks   U+202E turns the rest of the line around, so that "gpj.exe" reads well
                          and is not. Right-to-left scripts need no marks: each piece is isolated
                          and finds its direction by itself
    lone surrogates       no UTF-8 exists for them

They are shown by number, ‹U+202E›: there are pictures for some, ␀, but many fonts lack them.

Joiners (U+200C, U+200D) stay: Persian, Hindi and half of the emoji are written with them.

A figure with an interval is rounded by the interval: two digits of its width, the same places for
the value and both ends. Further digits would be noise.
"""

import math
import unicodedata
from typing import Any, Protocol, runtime_checkable

__all__ = ["EstimateLike", "estimate_text", "number", "visible"]

_KEPT = {"\n", "\t", "\u200c", "\u200d", "\ufe0e", "\ufe0f", "\u00ad"}
_MOST_PLACES = 6


@runtime_checkable
class EstimateLike(Protocol):
    """A figure with its interval and count; `lora_core.evaluate.Estimate` is one."""

    @property
    def value(self) -> float:
        """The figure."""

    @property
    def low(self) -> float:
        """Lower end of the interval; NaN for none."""

    @property
    def high(self) -> float:
        """Upper end."""

    @property
    def count(self) -> int:
        """How many units it was taken over."""

    @property
    def unit(self) -> str:
        """What is counted."""


def visible(text: object) -> str:
    """Text with every character that would act instead of show made visible.

    Args:
        text: anything; what `str` makes of it is taken.

    Returns:
        Text that UTF-8 holds, without control characters but newline and tab, without
        bidirectional marks. Not escaped for HTML yet.
    """
    plain = str(text).replace("\r\n", "\n").replace("\r", "\n")
    if plain.isascii() and plain.isprintable():
        return plain
    return "".join(map(_shown, plain))


def _shown(character: str) -> str:
    if character in _KEPT:
        return character
    code = ord(character)
    silent = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    if silent or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF:  # noncharacters
        return f"‹U+{code:04X}›"
    return character


def number(value: float | None) -> str:
    """A number in as many digits as are read: four, with separators above a thousand.

    Args:
        value: an integer is written whole; None and NaN are a dash.

    Returns:
        Such as "1,234,567", "0.8125", "3.2e-05", "–".
    """
    if value is None or value != value:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if size and not 1e-4 <= size < 1e9:
        return f"{value:.3g}"
    return f"{value:,.0f}" if size >= 10_000 else f"{value:.4g}"


def estimate_text(estimate: EstimateLike, *, percent: bool = False, count: bool = True) -> str:
    """An estimate in a line: value [low, high] (count unit).

    Args:
        estimate: value, low, high, count, unit.
        percent: times 100, with a percent sign.
        count: whether the count is said.

    Returns:
        Such as "0.81 [0.71, 0.89] (64 rows)"; without an interval the value and the count.
    """
    value, interval = value_and_interval(estimate, percent=percent)
    text = f"{value} {interval}" if interval else value
    return f"{text} ({count_text(estimate)})" if count else text


def value_and_interval(estimate: EstimateLike, *, percent: bool = False) -> tuple[str, str]:
    """The two parts of an estimate, rounded alike; the second is empty without an interval."""
    scale, sign = (100.0, "\u00a0%") if percent else (1.0, "")
    value, low, high = (scale * float(x) for x in (estimate.value, estimate.low, estimate.high))
    if not (math.isfinite(low) and math.isfinite(high) and math.isfinite(value)):
        return number(value) + sign, ""
    width = high - low
    if width <= 0:
        return number(value) + sign, f"[{number(low)}, {number(high)}]"
    places = 1 - math.floor(math.log10(width))
    if places > _MOST_PLACES:
        return number(value) + sign, f"[{number(low)}, {number(high)}]"
    digits = max(places, 0)
    shown = [f"{x:,.{digits}f}" for x in (value, low, high)]
    return shown[0] + sign, f"[{shown[1]}, {shown[2]}]"


def count_text(estimate: EstimateLike) -> str:
    """How many of what: "64 rows"."""
    return f"{number(estimate.count)} {visible(estimate.unit)}".strip()


def is_number(value: Any) -> bool:
    """Whether a cell is aligned as a figure."""
    return value is None or isinstance(value, int | float | EstimateLike)
