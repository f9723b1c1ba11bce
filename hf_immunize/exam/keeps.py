"""What an attacker keeps of a run, of the runs of a trial and of his trials: one place for judge, plan and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from hf_immunize.errors import RecordError
from hf_immunize.records import AttackTrace, Evaluation

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class StepsToThreshold:
    """First evaluation at which the metric stays at or above the threshold to the end of the run."""

    steps: int | None
    """None: not reached and held within ``budget``."""
    earliest: int | None
    """The step after the last evaluation below the threshold: the true figure lies in earliest..steps."""
    budget: int


def steps_to_threshold(trace: AttackTrace, threshold: float, split: Split = "test") -> StepsToThreshold:
    """Steps until ``split`` accuracy is at least ``threshold`` for good; a diverged run has not held it."""
    missed = StepsToThreshold(None, None, trace.budget)
    if trace.outcome != "completed" or getattr(trace.curve[-1], split) < threshold:
        return missed
    place = len(trace.curve)
    while place > 0 and getattr(trace.curve[place - 1], split) >= threshold:
        place -= 1
    earliest = trace.curve[place - 1].step + 1 if place > 0 else min(1, trace.curve[0].step)
    return StepsToThreshold(trace.curve[place].step, earliest, trace.budget)


def chosen_evaluation(trace: AttackTrace) -> Evaluation | None:
    """The evaluation an attacker who stops early would keep: best validation accuracy, the first of equals."""
    return max(trace.curve, key=lambda point: point.validation, default=None)


def best_trial(traces: Sequence[AttackTrace], threshold: float | None = None) -> str | None:
    """The trial an attacker would choose, looking at validation data only; None when no trial has every run measured.

    Trials with the fewest diverged runs; of these, the one with the smallest median steps to the threshold over
    seeds (not reached counts as infinite); of these, the best mean validation accuracy. Without a threshold only
    accuracy counts.
    """
    trials: dict[str, list[AttackTrace]] = {}
    for trace in traces:
        trials.setdefault(trace.trial, []).append(trace)

    def key(name: str) -> tuple[int, float, float, str]:
        runs = trials[name]
        diverged = sum(run.outcome == "diverged" for run in runs)
        steps = 0.0
        if threshold is not None:
            found = [steps_to_threshold(run, threshold, "validation").steps for run in runs]
            steps = median(math.inf if step is None else step for step in found)
        held = fmean(point.validation for point in map(chosen_evaluation, runs) if point is not None)
        return diverged, steps, -held, name

    seeds = max(map(len, trials.values()), default=0)  # trials that were only compared, on fewer seeds, are no choice
    measured = [name for name, runs in trials.items() if len(runs) == seeds and all(run.curve for run in runs)]
    return min(measured, key=key, default=None)


def runs_of_trial(traces: Sequence[AttackTrace], trial: str | None) -> dict[int, AttackTrace]:
    """Runs of one trial by seed. Raises RecordError for a seed that occurs twice."""
    runs: dict[int, AttackTrace] = {}
    for trace in traces:
        if trace.trial == trial and runs.setdefault(trace.seed, trace) is not trace:
            raise RecordError(
                f"expected one run of {trace.attack} {trial} with seed {trace.seed}, got two: keep one trace file."
            )
    return dict(sorted(runs.items()))


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
