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

    An attack that was not run at all is no departure: its cell says so. More trials, seeds and attacks than asked for
    are none either.
    """
    table = preset_table().get(plan.protocol)
    if table is None:
        return []
    found = [] if plan.threshold is None else ["a threshold given by hand"]
    runs = [trace for role in ("subject", "control") for trace in traces.get(role, ())]
    for item in (*plan.attacks, *plan.methods):
        if item.attack in table:
            mine = [trace for trace in runs if trace.attack == item.attack]
            curtails = item.adapts and plan.adaptation is not None and plan.adaptation.curtailed
            found += _departures_of(item, mine, table[item.attack], plan.seeds, curtails) if mine else []
            follows = plan.adaptation is None or item.adapts or item in plan.methods
            found += [] if follows or not mine else [f"{item.attack} with effort that does not follow the base"]
    return found


def _departures_of(
    item: PlannedAttack, runs: Sequence[AttackTrace], asked: Mapping[str, Any], seeds: Sequence[int], curtails: bool
) -> list[str]:
    """Missing trials and seeds of one attack on either side, and trials with other settings than the preset's."""
    found, budget, last = [], asked["budget"], max(trace.budget for trace in runs)
    for role, lowest in (("control", budget), ("control", last), ("subject", last)):
        mine = [trace for trace in runs if trace.role == role and trace.budget == lowest]
        names = {trial if lowest == budget else grown_name(trial, lowest) for trial in asked["trials"]}
        if missing := sorted(names - {trace.trial for trace in mine}):
            found.append(f"{item.attack} on the {role} without the trial {missing[0]}")
        # the judge sees to it that seeds of the subject are left out only where they can change nothing
        first = set(sorted(seeds)[: len(seeds) // 2 + 1])
        if role == "subject" and curtails and first == {trace.seed for trace in mine}:
            continue
        if lowest == last and (absent := sorted(set(seeds) - {trace.seed for trace in mine})):
            found.append(f"{item.attack} on the {role} without the seed {absent[0]}")
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
