"""Whether a learning curve that came out again is the certified one: at every evaluation, within what seeds do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hf_immunize.records import AttackTrace

ROWS_AT_A_BOUNDARY = 3
"""Test rows that another processor's rounding may put on the other side of a decision, where all seeds agree."""
LEAST_SCORE = 0.01
"""The same for a score that counts no rows, such as R²."""
NEAR = 3
"""Evaluations before and after one within which a curve that falls is restless there."""


@dataclass(frozen=True)
class Comparison:
    """Two sides of one trial: what was certified, and what came out."""

    agrees: bool
    evaluations: int
    distance: float | None
    bound: float | None
    told: str


def compare_trial(
    stored: Sequence[AttackTrace], fresh: Sequence[AttackTrace], rows: int | None
) -> Comparison:
    """Compare each certified run with the new run of its seed, at every evaluation.

    The bound of an evaluation is the range of the new runs there over all seeds, since that is what chance moves, or
    the deepest fall of any of them within ``NEAR`` evaluations: an attacker whose rate is at the edge of what descends
    is thrown back now and then, and at which step another processor's rounding decides. What is certified does not
    enter it, so that nobody can widen it. A curve may also be late or early by one evaluation.

    Args:
        stored: certified runs of one trial.
        fresh: new runs of the same trial with these seeds, and with at least one more where there is but one.
        rows: rows behind the score of the smaller split; None for a score that counts none.
    """
    again = {trace.seed: trace for trace in fresh}
    floor = LEAST_SCORE if rows is None else ROWS_AT_A_BOUNDARY / rows
    outcomes = {trace.outcome for trace in fresh}
    count, worst = 0, (0.0, floor, "")
    for run in stored:
        new = again[run.seed]
        if run.outcome != new.outcome:
            if len(outcomes) > 1:  # whether it diverges hangs by a thread here, which no certificate can know
                continue
            told = f"seed {run.seed} was certified as {run.outcome}, here it is {new.outcome}"
            return Comparison(False, count, None, None, told)
        if run.outcome == "completed" and run.samples != new.samples:
            told = f"seed {run.seed} was certified with {run.samples} training rows, here it has {new.samples}"
            return Comparison(False, count, None, None, told)
        if [point.step for point in run.curve] != [point.step for point in new.curve] and run.outcome == "completed":
            return Comparison(False, count, None, None, f"seed {run.seed} was certified at other steps than it is "
                              "evaluated at here")
        for place, (mine, theirs) in enumerate(zip(run.curve, new.curve, strict=False)):
            count += 1
            for split in ("validation", "test"):  # trials are chosen on the one and judged on the other
                bound = max(floor, _range_at(fresh, place, split), _fall_near(fresh, place, split))
                value, here = getattr(mine, split), getattr(theirs, split)
                off = _outside(value, [getattr(point, split) for point in new.curve[max(0, place - 1) : place + 2]])
                if off - bound > worst[0] - worst[1]:
                    worst = (off, bound, f"seed {run.seed} step {mine.step}, {split}: {here:.4g} here, certified "
                             f"{value:.4g}")
    distance, bound, where = worst
    told = f"{count} evaluations, {where or 'all alike'}; allowed {bound:.3g}"
    return Comparison(distance <= bound + 1e-9, count, distance, bound, told)


def _range_at(fresh: Sequence[AttackTrace], place: int, split: str) -> float:
    """How far apart the new runs lie at one evaluation."""
    values = [getattr(run.curve[place], split) for run in fresh if len(run.curve) > place]
    return max(values) - min(values) if values else 0.0


def _fall_near(fresh: Sequence[AttackTrace], place: int, split: str) -> float:
    """The deepest fall from one evaluation to the next of any new run, near this evaluation."""
    near = [[getattr(point, split) for point in run.curve[max(0, place - NEAR) : place + NEAR + 1]] for run in fresh]
    return max((before - after for values in near for before, after in pairwise(values)), default=0.0)


def _outside(value: float, near: Sequence[float]) -> float:
    """Distance from the range of neighbouring evaluations; 0 within it."""
    return max(min(near) - value, value - max(near), 0.0)
