"""Effort that follows the base: which budget its attackers needed, and which ranges ended too soon.

Pure functions of traces. The attack stage asks them what to run next, and the judge asks them again afterwards, so that
an exam whose budgets are not what its base's runs give is found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from hf_immunize.certification.proposing import check_proposals, proposed
from hf_immunize.certification.uplift import (
    Reach,
    best_known,
    guessing,
    reach_of,
    still_learning,
    threshold_between,
    without_model,
)
from hf_immunize.errors import IncompleteExamError
from hf_immunize.exam import Rule
from hf_immunize.exam.keeps import best_trial, runs_of_trial, steps_to_threshold
from hf_immunize.records import Adaptation, AttackTrace, Plan, PlannedAttack, Search

WIDENED = "widened"
"""In a trace's config: the how-manieth value beyond the range asked for its trial brings."""
RANGES = ("learning_rate", "rank", "penalty")
"""Settings whose best value must lie inside the values that were tried."""


@dataclass(frozen=True)
class Widening:
    """A trial that goes beyond the range: the best one with one setting replaced."""

    trial: str
    field: str
    value: float | int
    number: int

    @property
    def name(self) -> str:
        """Name of the new trial."""
        parts = [f"{self.field}={self.value:g}" if part.split("=")[0] == self.field else part
                 for part in self.trial.split(",")]
        return ",".join(parts)


@dataclass(frozen=True)
class Lines:
    """What decides how much effort the base needed."""

    rule: Rule
    adaptation: Adaptation
    anyway: Reach
    """What attackers reach without the model; not from random weights, whose runs follow the base."""

    @classmethod
    def of(cls, rule: Rule, adaptation: Adaptation, traces: Mapping[str, Sequence[AttackTrace]]) -> Lines:
        """From the runs of attackers without the model, and the classes that the base's attackers learn."""
        classes = next((trace.data[-1].classes for trace in traces.get("control", ()) if trace.data), {})
        chance = -math.inf if rule.gain else guessing(classes)
        return cls(rule, adaptation, without_model({"nothing": traces.get("nothing", ())}, 0, chance))

    def threshold(self, control: Sequence[AttackTrace]) -> tuple[float, float]:
        """The threshold as far as the base's runs tell, and the uplift that it is half of."""
        anyway, base = best_known(control, self.anyway, self.rule), reach_of(control, 0)
        reached = anyway if base is None else base
        return threshold_between(reached, anyway, self.rule), reached.mean - anyway.mean

    def beyond_base(self, given: int) -> Lines:
        """The same with room for what a side adds beyond the trials that the base was ``given``."""
        more = self.adaptation.model_copy(update={"widenings": self.adaptation.widenings + given})
        return Lines(self.rule, more, self.anyway)


def next_budget(control: Sequence[AttackTrace], asked: int, lines: Lines) -> int | None:
    """The budget the base's attackers are given next; None where the one they had will do, or is the largest allowed.

    Args:
        control: the base's runs with one budget, those on which trials are compared, within the range asked for.
        asked: the budget that the exam asks for.
    """
    budget, most = control[0].budget, lines.adaptation.most * asked
    if control[0].unit == "solve" or budget >= most or not any(trace.curve for trace in control):
        return None
    threshold, uplift = lines.threshold(control)
    if uplift <= 0 and not still_learning(control):
        return None
    needed = math.inf
    if uplift > 0:
        runs = runs_of_trial(control, best_trial(control, threshold)).values()
        steps = [steps_to_threshold(run, threshold).steps for run in runs]
        taken = median([math.inf if step is None else max(step, 1) for step in steps])
        needed = taken * lines.rule.slow_down_factor * lines.adaptation.margin
    if needed <= budget:
        return None
    larger = 2 * budget
    while larger < min(needed, most) and math.isfinite(needed):
        larger *= 2
    return min(larger, most)


def next_widening(traces: Sequence[AttackTrace], threshold: float, lines: Lines) -> Widening | None:
    """What is tried beyond the range because the best value of a setting lies at its edge; None where none does.

    Args:
        traces: one side's runs with one budget on which trials are compared, widened ones included.
    """
    number = 1 + max((widened(trace) for trace in traces), default=0)
    own = {trace.trial for trace in traces if widened(trace)}
    best = best_trial(traces, threshold)
    if best is None or len(own) >= lines.adaptation.widenings:
        return None
    config = next(trace.config for trace in traces if trace.trial == best)
    named = [part.split("=")[0] for part in best.split(",")]
    for field in RANGES:
        if field in named and (value := _beyond(field, config.get(field), traces)) is not None:
            return Widening(best, field, value, number)
    return None


def _beyond(field: str, best: object, traces: Sequence[AttackTrace]) -> float | int | None:
    """The value after the edge of at least three tried ones, as far from it as its neighbour; None inside the range."""
    tried = sorted({value for trace in traces
                    if not proposed(trace) and isinstance(value := trace.config.get(field), int | float) and value > 0})
    if len(tried) < 3 or best not in (tried[0], tried[-1]):
        return None
    edge, neighbour = (tried[0], tried[1]) if best == tried[0] else (tried[-1], tried[-2])
    if isinstance(edge, int):
        return 2 * edge if edge > neighbour else edge // 2 or None
    return float(f"{edge * edge / neighbour:.3g}")


def widened(trace: AttackTrace) -> int:
    """The how-manieth value beyond the range a run tries; 0 within it."""
    found = trace.config.get(WIDENED, 0)
    return found if isinstance(found, int) else 0


def asked_for(trace: AttackTrace) -> bool:
    """Whether a run's trial is one that the exam asks for, neither beyond a range nor proposed by a search."""
    return not widened(trace) and not proposed(trace)


def compared(traces: Sequence[AttackTrace]) -> list[AttackTrace]:
    """The runs on which trials are compared: those on the tuning seeds, or all."""
    tuning = next((found for trace in traces if isinstance(found := trace.config.get("tuning_seeds"), list)), None)
    return [trace for trace in traces if tuning is None or trace.seed in tuning]


def budgets_of(control: Sequence[AttackTrace], lines: Lines) -> list[int]:
    """The base's budgets one after the other, as its runs give them; the last one is judged.

    Raises:
        IncompleteExamError: runs with a budget that had to be tried are missing.
    """
    asked = min(trace.budget for trace in control)
    ladder = [asked]
    while True:
        runs = compared([trace for trace in control if trace.budget == ladder[-1] and asked_for(trace)])
        if not runs:
            raise _unfollowed(control[0].attack, "control", f"with a budget of {ladder[-1]}")
        larger = next_budget(runs, asked, lines)
        if larger is None:
            break
        ladder.append(larger)
    if extra := sorted({trace.budget for trace in control} - set(ladder)):
        raise _unfollowed(control[0].attack, "control", f"with budgets of {ladder} and no others, got {extra}")
    return ladder


def widenings_of(traces: Sequence[AttackTrace], threshold: float, lines: Lines, given: int = 0) -> list[Widening]:
    """What one side added to its ranges, as its runs give it.

    Args:
        given: how many widened trials come from the base; what this side adds comes after them.

    Raises:
        IncompleteExamError: runs of a trial that had to be added are missing, or others were added.
    """
    runs, found = compared(traces), list[Widening]()
    while True:
        told = [run for run in runs if widened(run) <= given + len(found)]
        following = next_widening(told, threshold, lines.beyond_base(given))
        if following is None:
            break
        if not any(run.trial == following.name and widened(run) == following.number for run in runs):
            raise _unfollowed(traces[0].attack, traces[0].role, f"of the trial {following.name}")
        found.append(following)
    if extra := sorted({run.trial for run in traces if widened(run) > given + len(found)}):
        raise _unfollowed(traces[0].attack, traces[0].role, f"without the trial {extra[0]}")
    return found


def follow_base(
    traces: Mapping[str, Sequence[AttackTrace]], plan: Plan, rule: Rule
) -> tuple[dict[str, list[AttackTrace]], Plan]:
    """The runs that count, those with the budget that the base led to, and the plan with the budgets on the way.

    Raises:
        IncompleteExamError: a side whose runs do not follow the base.
    """
    if plan.adaptation is None:
        return {role: list(found) for role, found in traces.items()}, plan
    lines = Lines.of(rule, plan.adaptation, traces)
    kept = {role: list(found) for role, found in traces.items()}
    items = []
    for item in plan.attacks:
        control = [trace for trace in traces.get("control", ()) if trace.attack == item.attack]
        if item.adapts and control:
            item = _followed(item, control, kept, lines, plan.search)
        items.append(item)
    return kept, plan.model_copy(update={"attacks": items})


def _followed(
    item: PlannedAttack, control: Sequence[AttackTrace], kept: dict[str, list[AttackTrace]], lines: Lines,
    search: Search | None,
) -> PlannedAttack:
    """One attack with its budgets; runs with others are taken out of ``kept``, those of each side checked."""
    budgets = budgets_of(control, lines)
    last = [trace for trace in control if trace.budget == budgets[-1]]
    threshold, _ = lines.threshold(compared([trace for trace in last if asked_for(trace)]))
    added = widenings_of(last, threshold, lines)
    for role, found in kept.items():
        mine = [trace for trace in found if trace.attack == item.attack]
        if role == "nothing" or not mine:
            continue
        final = [trace for trace in mine if trace.budget == budgets[-1]]
        if not final:
            raise _unfollowed(item.attack, role, f"with the budget of {budgets[-1]} that its base led to")
        if search is not None:
            check_proposals([trace for trace in compared(final) if not widened(trace)], search)
        if role == "subject" and any(trace.curve for trace in final):
            widenings_of(final, threshold, lines, len(added))
        kept[role] = [trace for trace in found if trace.attack != item.attack or trace.budget == budgets[-1]]
    return item.model_copy(update={
        "budgets": budgets if item.unit == "step" else [], "widened": [one.name for one in added],
        "budget": budgets[-1],
    })


def _unfollowed(attack: str, role: str, what: str) -> IncompleteExamError:
    return IncompleteExamError(
        f"expected runs of {attack} on the {role} {what}, since effort follows the base, got none such: run "
        "hf-immunize attack again with the same options, on the base first, and on the model with --control_path "
        "naming the base's folder; it makes only what is missing."
    )
