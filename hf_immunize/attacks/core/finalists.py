"""Which trials an attacker goes on with after comparing all of them on a few seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_immunize.records import AttackTrace


def finalists(traces: Sequence[AttackTrace]) -> tuple[str, ...]:
    """One or two names of trials.

    Of the trials with the fewest diverged runs, the one that learns fastest (mean validation score on a log scale of
    steps: evaluations are about equally spaced on it, so their sum stands for the area) and, if its own is better,
    the one with the best validation score. The first alone would flatter a model that starts far down: what recovers
    soonest need not come furthest.
    """
    trials: dict[str, list[AttackTrace]] = {}
    for trace in traces:
        trials.setdefault(trace.trial, []).append(trace)
    diverged = {name: sum(run.outcome == "diverged" for run in runs) for name, runs in trials.items()}
    sound = sorted(name for name in trials if diverged[name] == min(diverged.values()))

    def area(name: str) -> float:
        # a run without a curve is missing, not zero
        return sum(sum(point.validation for point in run.curve) if run.curve else -math.inf for run in trials[name])

    def best(name: str) -> float:
        return sum(max((point.validation for point in run.curve), default=-math.inf) for run in trials[name])

    fastest, furthest = max(sound, key=area), max(sound, key=best)
    return (fastest,) if best(furthest) <= best(fastest) else (fastest, furthest)
