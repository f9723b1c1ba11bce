"""The pictures of a report: learning curves, accuracies with their spread, and spectra."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from hf_immunize.records import AttackTrace, SpectrumRecord
from hf_immunize.report import svg
from hf_immunize.report.svg import Frame, Point
from hf_immunize.report.text import number, percent, plural

_MOST_POINTS = 160
_LETTERS = 44


@dataclass(frozen=True)
class Style:
    """How one model looks in every chart: a CSS class and a mark, so that colour is never alone."""

    css: str
    shape: str


BASE = Style("base", "circle")
SCRATCH = Style("scratch", "down")


def style_of(index: int) -> Style:
    """The look of the index-th immunized model."""
    shapes = ("square", "triangle", "diamond")
    return Style(f"m{index % 6 + 1}", shapes[index % len(shapes)])


@dataclass(frozen=True)
class Curves:
    """The runs of one model under one attack, one per seed, and the steps at which they reached the threshold."""

    label: str
    style: Style
    runs: Sequence[AttackTrace]
    reached: Sequence[int | None] = ()


def swatch(style: Style) -> Markup:
    """A piece of the model's line with its mark, for legends; hidden from screen readers."""
    frame = Frame(svg.percent_axis(), svg.percent_axis(), width=34, height=14, left=1, right=1, top=0, bottom=0)
    drawn = (
        svg.line(frame, [(0, 50), (100, 50)], f"line {style.css}"), svg.mark(17, 7, style.shape, f"mark {style.css}")
    )
    return svg.element("svg", *drawn, viewBox="0 0 34 14", width=34, height=14, aria_hidden="true", class_="swatch")


def learning_curves(
    attack: str, curves: Sequence[Curves], thresholds: Sequence[float], metric: str = "accuracy"
) -> Markup:
    """Harmful test score over the attacker's steps: mean line, band from the lowest to the highest seed.

    Accuracies are drawn on 0 to 100; another metric, which may fall far below zero, on the range in which the base
    learns, and as much again below it. What lies lower runs along the bottom, and the axis says that it was cut.
    """
    steps = [point.step for item in curves for run in item.runs for point in run.curve]
    scores, cut = (svg.percent_axis(), False) if metric == "accuracy" else _range_of(curves, thresholds)
    frame = Frame(svg.step_axis(steps), scores)
    said = f"Harmful {metric}, %" + (f" (cut at {number(scores.low)})" if cut else "")
    parts = [svg.y_axis(frame, said), svg.x_axis(frame, "Attacker's steps (log scale)")]
    parts += [_threshold_across(frame, 100 * value) for value in thresholds]
    parts += [_bands(frame, item) for item in curves]
    parts += [_mean_line(frame, item) for item in curves]
    parts += [_arrivals(frame, item, 100 * thresholds[0]) for item in curves if thresholds]
    return svg.picture(frame, f"Learning curves under {attack}", _curves_in_words(curves, thresholds), *parts)


def _range_of(curves: Sequence[Curves], thresholds: Sequence[float]) -> tuple[svg.Axis, bool]:
    """The axis, and whether some curve that does not start from scratch lies below it."""
    shown = [item for item in curves if item.style != SCRATCH] or curves
    values = [100 * point.test for item in shown for run in item.runs for point in run.curve]
    values += [100 * value for value in thresholds]
    low, high = min(values), max(values)
    base = [100 * point.test for item in curves if item.style == BASE for run in item.runs for point in run.curve]
    floor = math.floor(2 * min(base) - high) if base else -math.inf
    room = max(0.05 * (high - max(low, floor)), 0.1)
    return svg.percent_axis(max(low - room, floor), min(100.0, high + room)), low < floor


def _by_step(runs: Sequence[AttackTrace]) -> dict[int, list[float]]:
    """Accuracies in percent at the steps every seed was evaluated at."""
    tables = [{point.step: 100 * point.test for point in run.curve} for run in runs]
    common = set.intersection(*(set(table) for table in tables)) if tables else set()
    return {step: [table[step] for table in tables] for step in sorted(common)}


def _bands(frame: Frame, item: Curves) -> Markup:
    values = _by_step(item.runs)
    if len(item.runs) < 2:
        return Markup("")
    lower: list[Point] = [(step, min(seeds)) for step, seeds in values.items()]
    upper: list[Point] = [(step, max(seeds)) for step, seeds in values.items()]
    return svg.band(frame, lower, upper, f"band {item.style.css}")


def _mean_line(frame: Frame, item: Curves) -> Markup:
    means: list[Point] = [(step, sum(seeds) / len(seeds)) for step, seeds in _by_step(item.runs).items()]
    if not means:
        return Markup("")
    end = svg.mark(*frame.at(*means[-1]), item.style.shape, f"mark {item.style.css}")
    return svg.line(frame, means, f"line {item.style.css}") + end


def _arrivals(frame: Frame, item: Curves, threshold: float) -> Markup:
    """A short upright at each seed's step to the threshold."""
    parts = []
    for step in item.reached:
        if step is not None:
            across, down = frame.at(step, threshold)
            upright = {"x1": across, "x2": across, "y1": down - 6, "y2": down + 6}
            parts.append(svg.element("line", class_=f"arrival {item.style.css}", **upright))
    return Markup("").join(parts)


def _threshold_across(frame: Frame, value: float) -> Markup:
    start, end = frame.at(frame.x.low, value), frame.at(frame.x.high, value)
    return svg.element("line", x1=start[0], x2=end[0], y1=start[1], y2=end[1], class_="threshold") + svg.element(
        "text", f"threshold {value:.0f}%", x=start[0] + 4, y=start[1] - 5, class_="note"
    )


def _curves_in_words(curves: Sequence[Curves], thresholds: Sequence[float]) -> str:
    said = []
    for item in curves:
        means = [(step, sum(seeds) / len(seeds)) for step, seeds in _by_step(item.runs).items()]
        if means:
            (first, low), (last, high) = means[0], means[-1]
            said.append(
                f"{item.label}: {low:.0f}% at step {first:,}, {high:.0f}% at step {last:,}, "
                f"mean of {plural(len(item.runs), 'seed')}."
            )
    return " ".join([*said, *(f"Threshold {percent(value, 0)}." for value in thresholds)])


@dataclass(frozen=True)
class Strip:
    """One row of a strip chart: a value in percent, the single seeds behind it, or an interval around it."""

    label: str
    style: Style
    value: float
    seeds: Sequence[float] = ()
    low: float | None = None
    high: float | None = None


def strips(title: str, rows: Sequence[Strip], label: str, *, zoom: bool, threshold: float | None = None) -> Markup:
    """Rows of dots over one percent axis. ``zoom`` cuts the axis to the data; otherwise it runs from 0 to 100."""
    axis = _zoomed(rows) if zoom else svg.percent_axis()
    flat = svg.Axis(0, len(rows), ())
    frame = Frame(axis, flat, height=64 + 40 * len(rows), left=12, right=16, top=24 if threshold else 8)
    parts = [svg.x_axis(frame, label)]
    for value, _ in axis.ticks:
        across, down = frame.at(value, 0)
        parts.append(svg.element("line", x1=across, x2=across, y1=frame.top, y2=down, class_="grid"))
    if threshold is not None:
        parts.append(_threshold_down(frame, threshold))
    parts += [_strip(frame, row, len(rows) - index - 0.5) for index, row in enumerate(rows)]
    words = " ".join(f"{row.label}: {row.value:.1f}%." for row in rows)
    return svg.picture(frame, title, words, *parts)


def _strip(frame: Frame, row: Strip, height: float) -> Markup:
    parts = []
    across, down = frame.at(row.value, height)
    down += 8
    name = row.label if len(row.label) <= _LETTERS else row.label[: _LETTERS - 1] + "…"
    parts.append(svg.element("text", name, x=frame.left, y=down - 12, class_="name"))
    if row.low is not None and row.high is not None:
        low, high = frame.at(row.low, height)[0], frame.at(row.high, height)[0]
        parts.append(svg.element("line", x1=low, x2=high, y1=down, y2=down, class_=f"whisker {row.style.css}"))
    parts += [svg.mark(frame.at(seed, height)[0], down, "circle", f"seed {row.style.css}", 3) for seed in row.seeds]
    parts.append(svg.mark(across, down, row.style.shape, f"mark {row.style.css}", 5))
    right = across < (frame.left + frame.width) / 2
    free = [frame.at(value, height)[0] for value in (*row.seeds, row.low, row.high, row.value) if value is not None]
    parts.append(svg.element(
        "text", f"{row.value:.1f}%", x=max(free) + 9 if right else min(free) - 9, y=down + 4,
        text_anchor="start" if right else "end", class_="value",
    ))
    return Markup("").join(parts)


def _threshold_down(frame: Frame, value: float) -> Markup:
    across, down = frame.at(value, 0)
    late = value > 60
    return svg.element("line", x1=across, x2=across, y1=frame.top - 6, y2=down, class_="threshold") + svg.element(
        "text", f"threshold {value:.0f}%", x=across - 5 if late else across + 5, y=12,
        text_anchor="end" if late else "start", class_="note",
    )


def _zoomed(rows: Sequence[Strip]) -> svg.Axis:
    values = [value for row in rows for value in (row.value, row.low, row.high, *row.seeds) if value is not None]
    low, high = min(values), max(values)
    room = max((high - low) * 0.35, 1.0)
    return svg.percent_axis(max(0.0, low - room), min(100.0, high + room))


@dataclass(frozen=True)
class SpectrumLine:
    """One model's spectrum at one site on one task."""

    label: str
    style: Style
    record: SpectrumRecord


def spectra(title: str, lines: Sequence[SpectrumLine]) -> Markup:
    """Eigenvalues over the largest one, on a log scale: the last solid point stands at 1/κ; noise is dimmed."""
    relative = {line.label: _relative(line.record) for line in lines}
    kept = [
        value for line in lines for value in relative[line.label][: line.record.rank] if value > 0
    ] or [1.0]
    noisy = any(line.record.rank < len(line.record.eigenvalues) for line in lines)
    frame = Frame(
        svg.count_axis(max((len(values) for values in relative.values()), default=1)),
        svg.log_axis(min(kept) / (30 if noisy else 3), 1.0), left=44,
    )
    parts = [svg.y_axis(frame, "Eigenvalue over the largest"), svg.x_axis(frame, "Index of the eigenvalue")]
    for line in lines:
        points = [(index + 1.0, value) for index, value in enumerate(relative[line.label])]
        rank = line.record.rank
        noise = [point for point in points[max(rank - 1, 0) :] if point[1] >= frame.y.low]
        parts.append(svg.line(frame, _thin(noise), f"line noise {line.style.css}"))
        solid = [point for point in points[:rank] if point[1] > 0]
        parts.append(svg.line(frame, _thin(solid), f"line {line.style.css}"))
        if solid:
            parts.append(svg.mark(*frame.at(*solid[-1]), line.style.shape, f"mark {line.style.css}"))
    words = " ".join(
        f"{line.label}: rank {line.record.rank} of {len(line.record.eigenvalues)}, condition number "
        f"{number(line.record.condition_number)}."
        for line in lines
    )
    return svg.picture(frame, title, words, *parts)


def _relative(record: SpectrumRecord) -> list[float]:
    largest = max(record.eigenvalues, default=0.0)
    return [value / largest for value in record.eigenvalues] if largest > 0 else []


def _thin(points: Sequence[Point]) -> list[Point]:
    """At most some 160 points, both ends kept: more cannot be told apart."""
    stride = max(1, len(points) // _MOST_POINTS)
    thinned = list(points[::stride])
    return thinned if not points or thinned[-1] == points[-1] else [*thinned, points[-1]]
