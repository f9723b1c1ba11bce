"""Effort of an exam while it is sat: what the base's runs say is tried next, and what a model's runs have to follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hf_immunize.attacks import Attack
from hf_immunize.attacks.core.effort import Beyond, Effort, Proposed
from hf_immunize.attacks.core.plan import find_attack, plan_trials
from hf_immunize.certification.adapting import (
    Lines,
    Widening,
    asked_for,
    budgets_of,
    compared,
    next_budget,
    next_widening,
    widened,
    widenings_of,
)
from hf_immunize.certification.cells import build_cell
from hf_immunize.certification.curtailing import is_decided
from hf_immunize.certification.proposing import propose
from hf_immunize.certification.uplift import REFERENCES, guessing, without_model
from hf_immunize.errors import IncompleteExamError
from hf_immunize.exam import Protocol
from hf_immunize.exam.presets import asked_budget
from hf_immunize.records import AttackTrace, PlannedAttack

Settings = Mapping[str, Mapping[str, Sequence[object]]]


def adapting_attacks(
    protocol: Protocol, table: Mapping[str, Attack], names: Sequence[str], settings: Settings, trials: int | None
) -> tuple[str, ...]:
    """Attacks whose effort follows the base: those of a preset that says so, with the budget that it asks for.

    A budget given by hand stays as it is.
    """
    if protocol.adaptation is None:
        return ()
    asked = {name: {getattr(config, "steps", 1) for config, _ in plan_trials(
        find_attack(name, table), settings.get(name), trials)} for name in names}
    return tuple(name for name, steps in asked.items() if steps == {asked_budget(protocol.name, name)})


def attacked_base(*folders: str | Path | None) -> Path | None:
    """The first of these folders that holds runs on a base, which nobody then has to name; None where none does."""
    paths = [Path(folder) for folder in folders if folder is not None]
    return next((path for path in paths if (path / "traces" / "control").is_dir()), None)


def read_base(folder: Path) -> dict[str, list[AttackTrace]]:
    """The runs on the base, and of attackers without the model, that lie in its folder.

    Raises:
        IncompleteExamError: a base that was not attacked.
    """
    found = {role: [AttackTrace.read(path) for path in sorted((folder / "traces" / role).glob("*.json"))]
             for role in ("control", *REFERENCES)}
    if not found["control"]:
        raise IncompleteExamError(
            f"expected attack traces of the base in {folder}/traces/control, whose effort this exam follows, got none: "
            "run hf-immunize attack with --role control on the base first."
        )
    return found


@dataclass
class OnBase:
    """Goes on while a budget does not fit or the best value lies at an edge: the base's own exam.

    Args:
        names: attacks whose effort is adapted.
        references: runs of attackers without the model.
    """

    protocol: Protocol
    names: Sequence[str]
    references: Sequence[AttackTrace]

    def __call__(self, name: str, traces: Sequence[AttackTrace], effort: Effort) -> Effort | None:
        """What is tried next of an attack; None where its effort is enough."""
        if name not in self.names or self.protocol.adaptation is None or not _learned(traces):
            return None
        lines = Lines.of(self.protocol.rule, self.protocol.adaptation,
                         {"control": traces, "nothing": self.references})
        within = [trace for trace in traces if asked_for(trace)]
        if not effort.beyond and not effort.proposed:
            asked = asked_budget(self.protocol.name, name) or within[0].budget
            larger = next_budget(within, asked, lines)
            if larger is not None:
                return Effort(larger)
        if searched := _searched(traces, effort, self.protocol):
            return searched
        threshold, _ = lines.threshold(within)
        further = next_widening(traces, threshold, lines)
        return None if further is None else replace(effort, beyond=(*effort.beyond, _beyond(further)))


@dataclass
class AfterBase:
    """Begins where the base's effort ended, and goes on where the model's own best value lies at an edge."""

    protocol: Protocol
    names: Sequence[str]
    base: Mapping[str, Sequence[AttackTrace]]
    widens: bool = True
    """Whether ranges are widened for this side too: random weights only follow."""
    _thresholds: dict[str, tuple[float, int]] = field(default_factory=dict)

    def efforts(self) -> dict[str, Effort]:
        """By attack what the base's runs led to.

        Raises:
            IncompleteExamError: runs of the base are missing.
        """
        assert self.protocol.adaptation is not None  # only such exams follow
        found = {}
        for name in self.names:
            control = [trace for trace in self.base["control"] if trace.attack == name]
            if not control:
                raise IncompleteExamError(
                    f"expected runs of {name} on the base, whose effort this exam follows, got none: run hf-immunize "
                    "attack with --role control and the same attacks on the base first."
                )
            if not _learned(control):
                continue
            lines = Lines.of(self.protocol.rule, self.protocol.adaptation, self.base)
            budget = budgets_of(control, lines)[-1]
            last = [trace for trace in control if trace.budget == budget]
            threshold, _ = lines.threshold(compared([trace for trace in last if asked_for(trace)]))
            added = widenings_of(last, threshold, lines)
            self._thresholds[name] = threshold, len(added)
            grown = budget if budget != asked_budget(self.protocol.name, name) else None
            found[name] = Effort(grown, tuple(map(_beyond, added)))
        return found

    def __call__(self, name: str, traces: Sequence[AttackTrace], effort: Effort) -> Effort | None:
        """What this side tries beyond what the base was given; None where nothing."""
        if name not in self._thresholds or self.protocol.adaptation is None or not _learned(traces):
            return None
        if searched := _searched(traces, effort, self.protocol):
            return searched
        if not self.widens:
            return None
        threshold, given = self._thresholds[name]
        lines = Lines.of(self.protocol.rule, self.protocol.adaptation, self.base)
        further = next_widening(traces, threshold, lines.beyond_base(given))
        return None if further is None else replace(effort, beyond=(*effort.beyond, _beyond(further)))


    def decided(self, name: str, traces: Sequence[AttackTrace]) -> bool:
        """Whether the first seeds of an attack on the model say that it FAILS, whatever the others will do."""
        budget, rule = traces[0].budget, self.protocol.rule
        if self.protocol.adaptation is None or not self.protocol.adaptation.curtailed or name not in self._thresholds:
            return False
        sides = {role: [trace for trace in found if trace.attack == name and trace.budget == budget]
                 for role, found in self.base.items() if role in ("control", "scratch")}
        test = traces[0].data[-1]
        chance = -math.inf if rule.gain else guessing(test.classes)
        anyway = without_model(self.base, 0 if rule.gain else test.rows, chance)
        about = PlannedAttack(attack=name, family=traces[0].family, unit=traces[0].unit)
        try:
            cell = build_cell(name, about, {"subject": traces, **sides}, None, test.rows, rule, anyway)
        except IncompleteExamError:  # undecided
            return False
        return is_decided(cell, len({trace.seed for trace in sides["control"]}))


def _searched(traces: Sequence[AttackTrace], effort: Effort, protocol: Protocol) -> Effort | None:
    """The effort with what this side's search proposes next; None where it is done."""
    if protocol.search is None:
        return None
    found = propose([trace for trace in traces if not widened(trace)], protocol.search)
    made = tuple(Proposed(one.name, one.values, one.number, one.bars) for one in found)
    return replace(effort, proposed=(*effort.proposed, *made)) if made else None


def _learned(traces: Sequence[AttackTrace]) -> bool:
    return any(trace.curve for trace in traces)


def _beyond(found: Widening) -> Beyond:
    return Beyond(found.trial, found.name, found.field, found.value, found.number)
