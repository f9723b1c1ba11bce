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
            found += _departures_of(item, mine, table[item.attack], plan.seeds) if mine else []
    return found


def _departures_of(
    item: PlannedAttack, runs: Sequence[AttackTrace], asked: Mapping[str, Any], seeds: Sequence[int]
) -> list[str]:
    """Missing trials and seeds of one attack on either side, and trials with other settings than the preset's."""
    found = []
    for role in ("subject", "control"):
        mine = [trace for trace in runs if trace.role == role]
        if missing := sorted(set(asked["trials"]) - {trace.trial for trace in mine}):
            found.append(f"{item.attack} on the {role} without the trial {missing[0]}")
        if absent := sorted(set(seeds) - {trace.seed for trace in mine}):
            found.append(f"{item.attack} on the {role} without the seed {absent[0]}")
    for trace in runs:
        wanted = asked["trials"].get(trace.trial)
        if wanted is not None and settings_digest(trace.config, asked["fields"]) != wanted:
            found.append(f"{item.attack} {trace.trial} with other settings than the preset's")
            break
    return found
