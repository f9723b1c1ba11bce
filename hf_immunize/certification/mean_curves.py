"""Steps to a threshold on the mean curve of several seeds, and the ratio of two such steps with its interval.

First crossings of single curves are noisy and early: with one or two seeds they told of slow-downs of 1.75 to 1.9 that
the mean curve of five or six seeds put at 1.15 to 1.26. What crosses here is the mean over seeds of the checkpoint that
an attacker holds at each step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from hf_immunize.exam.keeps import kept_curve
from hf_immunize.metrics import mean_interval
from hf_immunize.records import AttackTrace, Evaluation, Interval


def mean_curve(runs: Sequence[AttackTrace]) -> list[Evaluation]:
    """What the runs of several seeds hold, on average, at the steps at which all were evaluated.

    A run that diverged keeps what it had: it counts with that at every later step of the others.
    """
    held = [kept_curve(run) for run in runs if run.curve]
    steps = sorted({step for curve in held for step, _ in curve if step >= max(curve[0][0] for curve in held)})
    found = []
    for step in steps:
        points = [next(point for at, point in reversed(curve) if at <= step) for curve in held]
        validation, test = fmean(point.validation for point in points), fmean(point.test for point in points)
        found.append(Evaluation(step=step, validation=validation, test=test))
    return found


def crossing(curve: Sequence[Evaluation], threshold: float) -> float | None:
    """Step at which a curve reaches ``threshold`` for good, between evaluations on a log scale; None where it does not.

    A curve that is above from its first evaluation on crosses there.
    """
    if not curve or curve[-1].test < threshold:
        return None
    place = len(curve) - 1
    while place > 0 and curve[place - 1].test >= threshold:
        place -= 1
    if place == 0:
        return float(curve[0].step)
    before, after = curve[place - 1], curve[place]
    share = (threshold - before.test) / (after.test - before.test)
    start = math.log(max(before.step, 1))
    return math.exp(start + share * (math.log(after.step) - start))


def curve_ratio(
    subject: Mapping[int, AttackTrace], control: Mapping[int, AttackTrace], threshold: float, level: float = 0.95
) -> Interval:
    """Steps of the subject's mean curve over steps of the control's, with the jackknife's t interval over seeds.

    Seeds that both have are left out one at a time (Efron & Tibshirani 1993, chapter 11), of the log ratio; the spacing
    of evaluations does not enter, since the curves are interpolated. A subject that does not get there counts with its
    budget: the estimate is None, and the interval has a lower bound alone. A control that does not says nothing.

    Args:
        subject, control: one run by seed.
    """
    seeds = sorted(set(subject) & set(control))

    def log_ratio(chosen: Sequence[int]) -> tuple[float | None, bool]:
        top = crossing(mean_curve([subject[seed] for seed in chosen]), threshold)
        bottom = crossing(mean_curve([control[seed] for seed in chosen]), threshold)
        if bottom is None:
            return None, False
        budget = min((subject[seed].budget for seed in chosen), default=1)
        return math.log((budget if top is None else top) / bottom), top is None

    whole, censored = log_ratio(seeds) if seeds else (None, False)
    if whole is None:
        return Interval(estimate=None, low=None, high=None, level=level, samples=len(seeds))
    parts = [log_ratio([other for other in seeds if other != seed]) for seed in seeds] if len(seeds) > 1 else []
    known = [value for value, _ in parts if value is not None]
    spread = mean_interval(
        [len(seeds) * whole - (len(seeds) - 1) * value for value in known] if len(known) == len(seeds) else [], level
    )
    half = None if spread.low is None or spread.high is None else (spread.high - spread.low) / 2
    open_above = censored or any(one for _, one in parts)
    return Interval(
        estimate=None if censored else math.exp(whole),
        low=None if half is None else math.exp(whole - half),
        high=None if half is None or open_above else math.exp(whole + half),
        level=level, samples=len(seeds),
    )
