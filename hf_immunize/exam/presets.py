"""What the runs of a preset exam have to look like, trial by trial, and where those of an exam depart from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hf_immunize.records import AttackTrace, Plan, PlannedAttack

PRESETS_FILE = Path(__file__).parent / "presets.json"
CUSTOM = "custom"
"""The name of an exam that follows no preset: which attacks it has is its examiner's choice."""
WITHOUT_MODEL = "without the model"
"""The family of attackers who hold no model."""
ATTACK_FRACTION = 0.8
"""Share of each class of the attacker's rows that a run of a preset trains on at least; fewer starve every attack."""
Traces = Mapping[str, Sequence[AttackTrace]]


def settings_digest(config: Mapping[str, Any], fields: Sequence[str]) -> str:
    """Sixteen digits that tell settings of an attack apart, whether they come from a dataclass or from a trace."""
    text = json.dumps([[name, config.get(name)] for name in fields])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def preset_table() -> dict[str, Any]:
    """Trials by preset and attack; see ``attacks.core.presets``."""
    found: dict[str, Any] = json.loads(PRESETS_FILE.read_text(encoding="utf-8"))
    return found


def known_attack(name: str) -> tuple[str, str] | None:
    """Family and unit of an attack that any preset has; None for another."""
    found = next((table[name] for table in preset_table().values() if name in table), None)
    return None if found is None else (found["family"], found["unit"])


def asked_budget(protocol: str, attack: str) -> int | None:
    """The budget that a preset exam asks for; None for an attack that it does not have."""
    found = preset_table().get(protocol, {}).get(attack)
    return None if found is None else int(found["budget"])


def run_departures(plan: Plan, traces: Mapping[str, Sequence[AttackTrace]]) -> list[str]:
    """How what was run differs from the preset that the plan names; nothing for a plan that names none.

    An attack that was not run at all is no departure: its cell says so. More trials and attacks than asked for are
    none either, nor are more seeds that go on where the preset's end: chosen ones could be the lucky ones.
    """
    table = preset_table().get(plan.protocol)
    if table is None:
        return []
    found = [] if plan.threshold is None else ["a threshold given by hand"]
    found += _other_means(traces)
    if traces.get("alternative"):  # it can only lift thresholds, and whoever checks does not have it
        found.append("another public model beside the base")
    sides = {role: traces.get(role, ()) for role in ("subject", "control")}
    for item in (*plan.attacks, *plan.methods):
        if item.attack in table:
            found += _departures_of(item, _runs_of(item, sides), table[item.attack], plan)
            follows = plan.adaptation is None or item.adapts or item in plan.methods
            found += [] if follows or not _runs_of(item, sides) else [
                f"{item.attack} with effort that does not follow the base"]
    return found + _departing_references(plan, traces.get("nothing", ()), table)


def _other_means(traces: Traces) -> list[str]:
    """Fewer digits, or batch norms of parts of a batch: attackers may learn less. Checkpointing changes nothing."""
    told = {(name, value) for runs in traces.values() for trace in runs
            for name in ("precision", "micro_batch_size") if isinstance(value := trace.config.get(name), str | int)}
    return [f"attackers with {name}={value}" for name, value in sorted(told, key=str)]


def _departing_references(plan: Plan, runs: Sequence[AttackTrace], table: Mapping[str, Any]) -> list[str]:
    """The same of attackers without the model: where any was run, each of this release has to be, and no other."""
    known = {name for name, about in table.items() if about["family"] == WITHOUT_MODEL}
    names = {trace.attack for trace in runs}
    found = [f"{name}, which is no attacker without the model of this release" for name in sorted(names - known)]
    found += [f"no runs of {name}, which has no model" for name in sorted(known - names) if names]
    for item in plan.references:
        if item.attack in known:
            found += _departures_of(item, _runs_of(item, {"nothing": runs}), table[item.attack], plan)
    return found


def _runs_of(item: PlannedAttack, sides: Traces) -> dict[str, list[AttackTrace]]:
    """The runs of one attack by role; nothing where it was run on no side."""
    mine = {role: [trace for trace in runs if trace.attack == item.attack] for role, runs in sides.items()}
    return mine if any(mine.values()) else {}


def _departures_of(
    item: PlannedAttack, sides: Traces, asked: Mapping[str, Any], plan: Plan
) -> list[str]:
    """Missing trials and seeds of one attack on any side, chosen seeds, fewer rows, and trials with other settings."""
    found, budget, runs = [], asked["budget"], [trace for mine in sides.values() for trace in mine]
    last = max((trace.budget for trace in runs), default=budget)
    curtails = item.adapts and plan.adaptation is not None and plan.adaptation.curtailed
    looked = [(role, steps) for role in sides for steps in ((budget, last) if role == "control" else (last,))]
    for role, steps in looked:
        mine = [trace for trace in sides[role] if trace.budget == steps]
        names = {trial if steps == budget else grown_name(trial, steps) for trial in asked["trials"]}
        if missing := sorted(names - {trace.trial for trace in mine}):
            found.append(f"{item.attack} on the {role} without the trial {missing[0]}")
        seeds = {trace.seed for trace in mine}
        # the judge sees to it that seeds of the subject are left out only where they can change nothing
        if role == "subject" and curtails and seeds == set(sorted(plan.seeds)[: len(plan.seeds) // 2 + 1]):
            continue
        absent = sorted({*plan.seeds, *range(max(seeds, default=0))} - seeds)
        if steps == last and absent:
            found.append(f"{item.attack} on the {role} without the seed {absent[0]}")
    compared = plan.seeds[: plan.tuning_seeds or 0]
    if any(trace.config.get("tuning_seeds", compared) != compared for trace in runs):
        found.append(f"{item.attack} with trials that were compared on other seeds than the preset's")
    if less := [share for trace in runs if isinstance(share := trace.config.get("attack_fraction"), float)
                and share < ATTACK_FRACTION]:
        found.append(f"{item.attack} on {100 * less[0]:g} % of each class, less than {100 * ATTACK_FRACTION:g} %")
    for trace in runs:
        grown = trace.budget != budget
        trial = trace.trial.removesuffix(f",steps={trace.budget}") if grown else trace.trial
        wanted = asked["trials"].get("default" if trial == f"steps={trace.budget}" else trial)
        config = trace.config | ({"steps": budget} if grown and trace.config.get("steps") == trace.budget else {})
        if wanted is not None and settings_digest(config, asked["fields"]) != wanted:
            found.append(f"{item.attack} {trace.trial} with other settings than the preset's")
            break
    return list(dict.fromkeys(found))


def grown_name(trial: str, steps: int) -> str:
    """The name of a trial with a larger budget than the one asked for."""
    return f"steps={steps}" if trial == "default" else f"{trial},steps={steps}"
