"""Numbers and intervals as a reader should see them: unit, open bounds and missing values said aloud."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence

from hf_immunize.records import Certificate, Interval, Side

NONE = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def clean(text: str) -> str:
    """The text without control, bidirectional-override and unpaired surrogate characters; line breaks become spaces."""
    kept = (" " if letter in "\n\r\t\u2028\u2029" else letter for letter in text)
    return "".join(letter for letter in kept if unicodedata.category(letter) not in {"Cc", "Cf", "Cs"})


def power_of_ten(power: int) -> str:
    """10³ with a real superscript."""
    return "10" + str(power).translate(_SUPERSCRIPT)


def number(value: float | None, digits: int = 3) -> str:
    """A magnitude with some ``digits`` significant digits; powers of ten outside 0.001 to 100,000."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    size = abs(value)
    if 1e-3 <= size < 1e5:
        decimals = max(0, digits - 1 - _exponent(size))
        written = f"{value:,.{decimals}f}"
        return written.rstrip("0").rstrip(".") if "." in written else written
    mantissa, power = f"{value:.{max(digits - 2, 0)}e}".split("e")
    return f"{mantissa} × {power_of_ten(int(power))}"


def ratio(certificate: Certificate) -> str:
    """The relative immunization ratio with its spread over halves of the rows, where that was measured."""
    spread = certificate.immunization_ratio_spread
    told = number(certificate.immunization_ratio)
    return told if spread is None else f"{told} ({number(spread.low)} to {number(spread.high)} over halves of the rows)"


def _exponent(size: float) -> int:
    return int(f"{size:e}".split("e")[1])


def percent(fraction: float | None, digits: int = 1) -> str:
    """An accuracy between 0 and 1 as percent."""
    return NONE if fraction is None else f"{100 * fraction:.{digits}f}%"


def signed(value: float, digits: int = 1) -> str:
    """A difference with its sign; a real minus."""
    rounded = round(value, digits) + 0.0
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"


def bounds(interval: Interval, scale: float = 1.0, digits: int = 1) -> str:
    """``(low to high)`` of a signed quantity; an open bound is written as open; nothing without any bound."""
    if interval.low is None and interval.high is None:
        return ""
    low = "open" if interval.low is None else signed(scale * interval.low, digits)
    high = "open" if interval.high is None else signed(scale * interval.high, digits)
    return f"({low} to {high})"


def points(interval: Interval, scale: float = 100.0) -> str:
    """A signed difference in points with its interval."""
    if interval.estimate is None:
        return bounds(interval, scale) or "no figure"
    return f"{signed(scale * interval.estimate)} {bounds(interval, scale)}".strip()


def share(interval: Interval | None) -> str:
    """A share with its interval, in percent: ``62% (40 to 85)``; nothing where none could be told."""
    if interval is None or interval.estimate is None:
        return ""
    low, high = ("open" if bound is None else f"{100 * bound:.0f}".replace("-", "−")
                 for bound in (interval.low, interval.high))
    told = f"{100 * interval.estimate:.0f}%".replace("-", "−")
    return f"{told} ({low} to {high})" if (low, high) != ("open", "open") else told


def slow_down(interval: Interval) -> str:
    """``12× (9 to 16)``; a censored one by its bound alone; never a number that was not measured."""
    low, high = _bound(interval.low, math.floor), _bound(interval.high, math.ceil)
    if interval.estimate is not None:
        estimate = f"{number(interval.estimate, 2)}×"
        return f"{estimate} ({low or 'open'} to {high or 'open'})" if low or high else estimate
    if low and high:
        return f"between {low}× and {high}×"
    if low:
        return f"at least {low}×"
    return f"at most {high}×" if high else "no figure"


def _bound(value: float | None, outwards: Callable[[float], int]) -> str:
    """Two significant digits, rounded away from the interval's middle: a bound must not gain by rounding."""
    if value is None:
        return ""
    unit = 10.0 ** (min(_exponent(value), 2) - 1) if 0 < value < 1e5 else 1.0
    return number(outwards(round(value / unit, 6)) * unit, 2)


def steps(side: Side | None, budget: int) -> str:
    """Steps to the threshold, seed by seed; a seed that did not reach it is written as more than the budget."""
    if side is None or not side.steps_to_threshold:
        return NONE
    reached = side.steps_to_threshold
    if all(step is None for step in reached):
        return f"not reached in {budget:,}"
    return ", ".join(f">{budget:,}" if step is None else f"{step:,}" for step in reached)


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return sum(values) / len(values) if values else None


def accuracy(side: Side | None) -> float | None:
    """Mean over seeds of the best accuracy the attacker got; None where every run diverged or none was made."""
    return None if side is None else mean(side.accuracy)


def score_word(metric: str) -> str:
    """What a column calls the attackers' score: an accuracy by its name, another metric, named once above, a score."""
    return metric if metric == "accuracy" else "score"


def plural(count: int, word: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
