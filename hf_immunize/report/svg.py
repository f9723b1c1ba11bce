"""Scalable vector graphics as text: elements, axes, lines, bands and marks, all escaped, coloured by CSS class."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from hf_immunize.report.text import clean, power_of_ten

Point = tuple[float, float]


def element(name: str, *children: str | Markup, **attributes: str | float | None) -> Markup:
    """One element. Text children and attribute values are escaped; ``stroke_width`` is written ``stroke-width``."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _attribute(value))
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(child if isinstance(child, Markup) else escape(clean(child)) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, inside)


def _attribute(value: str | float) -> str:
    """Coordinates with one decimal: a tenth of a pixel is finer than any screen shows."""
    if isinstance(value, str):
        return clean(value)
    return f"{value:.1f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Axis:
    """A scale with its ticks. On a log axis, values at or below zero sit at the lower end."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def fraction(self, value: float) -> float:
        """Where ``value`` lies between the ends, held within 0 and 1."""
        if self.log:
            span = math.log10(self.high) - math.log10(self.low)
            raw = (math.log10(value) - math.log10(self.low)) / span if value > 0 else 0.0
        else:
            raw = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, raw))


def percent_axis(low: float = 0.0, high: float = 100.0) -> Axis:
    """A linear axis in percent, its ticks at round numbers."""
    return Axis(low, high, tuple((tick, f"{tick:g}") for tick in round_ticks(low, high, 5)))


def count_axis(count: int) -> Axis:
    """A linear axis over the indices 1..count."""
    ticks = [tick for tick in round_ticks(1, count, 5) if tick >= 1 and tick == int(tick)]
    if not ticks or ticks[0] > 1:
        ticks = [1, *[tick for tick in ticks if tick > count / 12]]
    return Axis(1, max(count, 2), tuple((tick, f"{tick:,.0f}") for tick in ticks))


def log_axis(low: float, high: float, most: int = 6) -> Axis:
    """A log axis over whole decades, labelled at no more than ``most`` powers of ten."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    stride = math.ceil((last - first + 1) / most)
    ticks = tuple((10.0**power, power_of_ten(power)) for power in range(last, first - 1, -stride))
    return Axis(10.0**first, 10.0**last, ticks, log=True)


def step_axis(steps: Iterable[int]) -> Axis:
    """A log axis for optimizer steps. Step 0 has no logarithm: it gets a tick of its own, half a decade to the left."""
    values = set(steps)
    positive = [step for step in values if step > 0] or [1]
    first, last = min(positive), max(max(positive), 2 * min(positive))
    low = first / 10**0.5 if 0 in values else float(first)
    decades = range(math.ceil(math.log10(first) - 1e-9), math.floor(math.log10(last)) + 1)
    ticks = [(10.0**power, f"{10**power:,}") for power in decades]
    if len(ticks) < 2:
        ticks = [(float(first), f"{first:,}"), (float(last), f"{last:,}")]
    return Axis(low, float(last), tuple([(0.0, "0")] * (0 in values) + ticks), log=True)


def round_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between ``low`` and ``high``, some ``about`` of them."""
    raw = (high - low) / max(about, 1)
    if raw <= 0:
        return [low]
    unit = 10.0 ** math.floor(math.log10(raw))
    stride = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first = math.ceil(low / stride - 1e-9)
    last = math.floor(high / stride + 1e-9)
    return [round(index * stride, 12) for index in range(first, last + 1)]


@dataclass(frozen=True)
class Frame:
    """A plotting area with its two axes; converts data to pixels."""

    x: Axis
    y: Axis
    width: float = 340
    height: float = 224
    left: float = 40
    right: float = 14
    top: float = 26
    bottom: float = 38

    def at(self, x: float, y: float) -> Point:
        """Pixel position of a data point."""
        across = self.left + self.x.fraction(x) * (self.width - self.left - self.right)
        down = self.height - self.bottom - self.y.fraction(y) * (self.height - self.top - self.bottom)
        return across, down


def picture(frame: Frame, label: str, description: str, *children: Markup) -> Markup:
    """The whole image, with the name and the description that a screen reader gives."""
    return element(
        "svg",
        element("desc", description),
        *children,
        viewBox=f"0 0 {frame.width:g} {frame.height:g}",
        role="img",
        aria_label=label,
        class_="chart",
    )


def x_axis(frame: Frame, label: str) -> Markup:
    """Base line, ticks and label of the horizontal axis."""
    floor = frame.height - frame.bottom
    parts = [element("line", x1=frame.left, x2=frame.width - frame.right, y1=floor, y2=floor, class_="axis")]
    for value, text in frame.x.ticks:
        across, _ = frame.at(value, frame.y.low)
        parts.append(element("line", x1=across, x2=across, y1=floor, y2=floor + 4, class_="axis"))
        parts.append(element("text", text, x=across, y=floor + 16, text_anchor="middle", class_="tick"))
    middle = (frame.left + frame.width - frame.right) / 2
    parts.append(element("text", label, x=middle, y=frame.height - 4, text_anchor="middle", class_="label"))
    return Markup("").join(parts)


def y_axis(frame: Frame, label: str) -> Markup:
    """Grid lines and tick labels of the vertical axis; its label stands level above the plot."""
    parts = [element("text", label, x=2, y=12, class_="label")]
    for value, text in frame.y.ticks:
        _, down = frame.at(frame.x.low, value)
        parts.append(element("line", x1=frame.left, x2=frame.width - frame.right, y1=down, y2=down, class_="grid"))
        parts.append(element("text", text, x=frame.left - 6, y=down + 4, text_anchor="end", class_="tick"))
    return Markup("").join(parts)


def line(frame: Frame, points: Sequence[Point], css: str) -> Markup:
    """A polyline through the points; nothing for fewer than two."""
    if len(points) < 2:
        return Markup("")
    return element("polyline", points=_path(frame, points), class_=css)


def band(frame: Frame, lower: Sequence[Point], upper: Sequence[Point], css: str) -> Markup:
    """The area between two lines over the same x values."""
    if len(lower) < 2:
        return Markup("")
    return element("polygon", points=_path(frame, [*upper, *reversed(lower)]), class_=css)


def _path(frame: Frame, points: Iterable[Point]) -> str:
    return " ".join(f"{across:.1f},{down:.1f}" for across, down in (frame.at(x, y) for x, y in points))


_SHAPES = {
    "square": "M{a},{b}h{w}v{w}h-{w}z",
    "triangle": "M{x},{b}l{r},{w}h-{w}z",
    "diamond": "M{x},{b}l{r},{r}l-{r},{r}l-{r},-{r}z",
    "down": "M{a},{b}h{w}l-{r},{w}z",
}
MARKS = ("circle", *_SHAPES)
"""Names of the mark shapes: series differ in shape and dash as well as in colour."""


def mark(across: float, down: float, shape: str, css: str, radius: float = 4.0) -> Markup:
    """A mark at a pixel position."""
    if shape == "circle":
        return element("circle", cx=across, cy=down, r=radius, class_=css)
    drawn = _SHAPES[shape].format(
        x=f"{across:.1f}", a=f"{across - radius:.1f}", b=f"{down - radius:.1f}", r=f"{radius:g}", w=f"{2 * radius:g}"
    )
    return element("path", d=drawn, class_=css)
