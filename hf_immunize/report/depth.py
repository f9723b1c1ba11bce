"""The picture of a profile: what drawing the last blocks anew costs an attacker, and where probes find the task."""

from __future__ import annotations

from markupsafe import Markup

from hf_immunize.records import DepthProfile
from hf_immunize.report import svg
from hf_immunize.report.charts import BASE, SCRATCH, style_of
from hf_immunize.report.pictures import chart_style
from hf_immunize.report.svg import Frame, Point
from hf_immunize.report.text import clean, number, percent

_MARGIN, _HEAD, _GAP, _LONGEST = 12, 62, 24, 92


def depth_picture(profile: DepthProfile) -> str:
    """A self-contained SVG file: T(n)/T(0) over n on the left, probe accuracy by block on the right."""
    left, right = reset_chart(profile), probe_chart(profile)
    width, height = 2 * 340 + _GAP, 224
    told = profile.proposal
    trained = told.trainable_modules or "the whole network"
    lines = (f"{profile.model.name}: uplift over no model {number(_points(profile.uplift.estimate))} points",
             f"Proposed: train {trained}; {told.told}"[:_LONGEST])
    parts = [
        svg.element("rect", width=width + 2 * _MARGIN, height=height + _HEAD + _MARGIN, class_="paper"),
        svg.element("text", clean(lines[0]), x=_MARGIN, y=22, class_="title"),
        svg.element("text", clean(lines[1]), x=_MARGIN, y=42, class_="key"),
        svg.element("svg", left, x=_MARGIN, y=_HEAD, width=340, height=height),
        svg.element("svg", right, x=_MARGIN + 340 + _GAP, y=_HEAD, width=340, height=height),
    ]
    return svg.element(
        "svg", svg.element("title", "Profile before defending"), svg.element("style", chart_style()), *parts,
        xmlns="http://www.w3.org/2000/svg", width=width + 2 * _MARGIN, height=height + _HEAD + _MARGIN,
        viewBox=f"0 0 {width + 2 * _MARGIN:g} {height + _HEAD + _MARGIN:g}",
    ) + "\n"


def _points(share: float | None) -> float | None:
    return None if share is None else 100 * share


def reset_chart(profile: DepthProfile) -> Markup:
    """T(n)/T(0): a circle where the threshold was reached, a triangle upwards where the budget ended before."""
    plain = profile.resets[0].steps or float(profile.budget)
    last = len(profile.blocks) + 1  # random weights stand to the right of all blocks
    points: list[tuple[int, float, bool]] = [
        (last if point.blocks is None else point.blocks, (point.steps or profile.budget) / plain, point.steps is None)
        for point in profile.resets
    ]
    heights = [ratio for _, ratio, _ in points] + [profile.rule.target]
    ticks = [(tick, f"{tick:.0f}") for tick in svg.round_ticks(0, last - 1, 5) if tick == int(tick)]
    across = svg.Axis(-0.5, last + 0.5, (*ticks, (float(last), "all")))
    frame = Frame(across, svg.log_axis(min(heights) / 1.5, max(heights) * 1.5))
    reached: list[Point] = [(float(n), ratio) for n, ratio, censored in points if not censored and n < last]
    parts = [
        svg.y_axis(frame, "T(n) over T(0)"), svg.x_axis(frame, "Last blocks drawn anew before fine-tuning"),
        svg.line(frame, [(frame.x.low, profile.rule.target), (frame.x.high, profile.rule.target)], "threshold"),
        svg.line(frame, reached, "line base"),
    ]
    for n, ratio, censored in points:
        style = SCRATCH if n == last else BASE
        parts.append(svg.mark(*frame.at(n, ratio), "triangle" if censored else style.shape, f"mark {style.css}"))
    words = " ".join(
        f"n = {'all' if n == last else n}: {'more than ' if censored else ''}{number(ratio)} times."
        for n, ratio, censored in points
    )
    return svg.picture(frame, "Steps after drawing the last blocks anew", words, *parts)


def probe_chart(profile: DepthProfile) -> Markup:
    """Accuracy of a ridge probe on every block's output: the model, random weights, and what there is without it."""
    frame = Frame(svg.count_axis(max(len(profile.depths), 1)), svg.percent_axis())
    trained: list[Point] = [(place, 100 * point.trained) for place, point in enumerate(profile.depths, 1)]
    random: list[Point] = [(place, 100 * point.random) for place, point in enumerate(profile.depths, 1)]
    model = style_of(0)
    without = 100 * profile.without
    parts = [
        svg.y_axis(frame, "Probe accuracy, % (squares: model; down: random)"), svg.x_axis(frame, "Block"),
        svg.line(frame, [(frame.x.low, without), (frame.x.high, without)], "threshold"),
        svg.line(frame, random, f"line {SCRATCH.css}"), svg.line(frame, trained, f"line {model.css}"),
        *(svg.mark(*frame.at(*point), SCRATCH.shape, f"mark {SCRATCH.css}") for point in random),
        *(svg.mark(*frame.at(*point), model.shape, f"mark {model.css}") for point in trained),
    ]
    words = " ".join(
        f"{point.block}: {percent(point.trained)}, random weights {percent(point.random)}." for point in profile.depths
    )
    return svg.picture(frame, "Probes by depth", f"Without the model {percent(profile.without)}. {words}", *parts)
