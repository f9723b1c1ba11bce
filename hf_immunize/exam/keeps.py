"""What an attacker keeps of a run, of the runs of a trial and of his trials: one place for judge, plan and pictures.

He looks at validation data alone, keeps the checkpoint that was best there at any step, whatever the run did later, and
of equally good ones the longest trained. A run that diverges costs its seed, not its trial, and not what was kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from hf_immunize.errors import RecordError
from hf_immunize.records import AttackTrace, Evaluation

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class StepsToThreshold:
    """First evaluation from which the kept checkpoint is at or above the threshold to the end of the run."""

    steps: int | None
    """None: not reached and held within ``budget``."""
    earliest: int | None
    """The step after the last evaluation below the threshold: the true figure lies in earliest..steps."""
    budget: int


def kept_curve(trace: AttackTrace) -> list[tuple[int, Evaluation]]:
    """At each evaluation its step and the checkpoint an attacker holds by then: the best on validation so far."""
    held: list[tuple[int, Evaluation]] = []
    for point in trace.curve:
        better = not held or point.validation >= held[-1][1].validation
        held.append((point.step, point if better else held[-1][1]))
    return held


def chosen_evaluation(trace: AttackTrace) -> Evaluation | None:
    """The checkpoint an attacker has in the end; None for a run without any evaluation."""
    held = kept_curve(trace)
    return held[-1][1] if held else None


def steps_to_threshold(trace: AttackTrace, threshold: float, split: Split = "test") -> StepsToThreshold:
    """Steps until the kept checkpoint's score on ``split`` is at least ``threshold`` for good."""
    held = kept_curve(trace)
    if not held or getattr(held[-1][1], split) < threshold:
        return StepsToThreshold(None, None, trace.budget)
    place = len(held)
    while place > 0 and getattr(held[place - 1][1], split) >= threshold:
        place -= 1
    earliest = held[place - 1][0] + 1 if place > 0 else min(1, held[0][0])
    return StepsToThreshold(held[place][0], earliest, trace.budget)


def by_trial(traces: Sequence[AttackTrace]) -> dict[str, list[AttackTrace]]:
    """Runs by the name of their trial."""
    trials: dict[str, list[AttackTrace]] = {}
    for trace in traces:
        trials.setdefault(trace.trial, []).append(trace)
    return trials


def best_trial(traces: Sequence[AttackTrace], threshold: float | None = None) -> str | None:
    """The trial an attacker would choose, looking at validation data only; None when no run has an evaluation.

    Of the trials with most seeds, the one with the smallest median steps to the threshold over seeds (not reached, and
    diverged before anything was reached, count as infinite); of these, the one whose better half of seeds is fastest;
    of these, the best mean validation score over what was kept. Without a threshold only scores count: the median over
    seeds first, then the mean.
    """
    trials = by_trial(traces)

    def key(name: str) -> tuple[float, float, float, str]:
        runs = trials[name]
        kept = [point.validation if (point := chosen_evaluation(run)) else -math.inf for run in runs]
        mean = fmean(score for score in kept if score > -math.inf)
        if threshold is None:
            return -median(kept), fmean(_best_half([-score for score in kept])), -mean, name
        steps = [steps_to_threshold(run, threshold, "validation").steps for run in runs]
        reached = [math.inf if step is None else float(step) for step in steps]
        return median(reached), fmean(_best_half(reached)), -mean, name

    seeds = max(map(len, trials.values()), default=0)  # trials that were only compared, on fewer seeds, are no choice
    measured = [name for name, runs in trials.items() if len(runs) == seeds and any(run.curve for run in runs)]
    return min(measured, key=key, default=None)


def _best_half(values: Sequence[float]) -> list[float]:
    """The smaller half, its middle one included."""
    return sorted(values)[: (len(values) + 1) // 2]


def soonest_by_seed(traces: Sequence[AttackTrace], threshold: float) -> dict[int, StepsToThreshold]:
    """For each seed the run of any trial whose kept checkpoint passes soonest: an attacker who tries them all."""
    found: dict[int, StepsToThreshold] = {}
    for trace in traces:
        reached = steps_to_threshold(trace, threshold)
        best = found.get(trace.seed)
        if best is None or (reached.steps or math.inf) < (best.steps or math.inf):
            found[trace.seed] = reached
    return dict(sorted(found.items()))


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
    """Names of the trials that an attacker goes on with after comparing all of them on a few seeds: one to three.

    The one that learns fastest (mean kept validation score on a log scale of steps), where its own is better the one
    that comes furthest, and where it is another the one with the best single seed. The first alone would flatter a
    model that starts far down: what recovers soonest need not come furthest.
    """
    trials, areas = by_trial(traces), learning_areas(traces)

    def scores(name: str) -> list[float]:
        return [point.validation if (point := chosen_evaluation(run)) else -math.inf for run in trials[name]]

    def best(rank: Callable[[str], float]) -> str:
        return max(sorted(trials), key=rank)

    fastest, furthest = best(areas.__getitem__), best(lambda name: median(scores(name)))
    luckiest = best(lambda name: max(scores(name)))
    chosen = [fastest]
    if median(scores(furthest)) > median(scores(fastest)):
        chosen.append(furthest)
    if all(max(scores(luckiest)) > max(scores(name)) for name in chosen):
        chosen.append(luckiest)
    return tuple(chosen)


def learning_areas(traces: Sequence[AttackTrace]) -> dict[str, float]:
    """How fast each trial learns: mean kept validation score on a log scale of steps, median over its seeds."""
    grid = sorted({point.step for trace in traces for point in trace.curve})
    return {name: median(_held_area(run, grid) for run in runs) for name, runs in by_trial(traces).items()}


def held_by(run: AttackTrace, step: int) -> float | None:
    """The best validation score up to a step; None before the first evaluation."""
    return max((point.validation for point in run.curve if point.step <= step), default=None)


def _held_area(run: AttackTrace, grid: Sequence[int]) -> float:
    """Mean over the evaluations of all runs of what was held by then; a run that ended early keeps what it had.

    Evaluations are about equally spaced on a log scale of steps. A run without any is missing, not zero.
    """
    held = kept_curve(run)
    if not held:
        return -math.inf
    found, place = [], 0
    for step in grid:
        while place + 1 < len(held) and held[place + 1][0] <= step:
            place += 1
        if held[place][0] <= step:
            found.append(held[place][1].validation)
    return fmean(found) if found else -math.inf
