"""Adversaries: one file each, one plain table for each kind of model. None of them knows how a model was defended."""

import sys

from hf_immunize.attacks.core.plan import parse_settings, plan_runs, plan_trials
from hf_immunize.attacks.core.rounds import count_runs
from hf_immunize.attacks.core.shape import Attack, Result, Role, Run, evaluation_steps, setting
from hf_immunize.attacks.core.suite import SuiteSummary, run_suite
from hf_immunize.attacks.registering import register_attack
from hf_immunize.attacks.vision import (
    ATTACKS,
    REFERENCES,
    TRAINABILITY,
    AttackContext,
    describe_model,
)
from hf_immunize.attacks.vision._row import row
from hf_immunize.models import load_classifier, load_processor

# Before attacks were sorted into folders their modules lay here; code that imports them from here still can.
for _path, _module in list(sys.modules.items()):
    _folder, _, _name = _path.removeprefix(f"{__name__}.").partition(".")
    if _folder in ("core", "vision") and _path.startswith(__name__) and _name:
        setattr(sys.modules[__name__], _name, sys.modules.setdefault(f"{__name__}.{_name}", _module))

__all__ = [
    "ATTACKS",
    "REFERENCES",
    "TRAINABILITY",
    "Attack",
    "AttackContext",
    "Result",
    "Role",
    "Run",
    "SuiteSummary",
    "count_runs",
    "describe_model",
    "evaluation_steps",
    "load_classifier",
    "load_processor",
    "parse_settings",
    "plan_runs",
    "plan_trials",
    "register_attack",
    "row",
    "run_suite",
    "setting",
]
