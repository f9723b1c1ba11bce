"""Adversaries: one file each, one plain table. None of them knows how a model was defended."""

from hf_immunize.attacks import (
    full_finetune,
    linear_probe_adam,
    linear_probe_gd,
    lora,
    ridge_probe,
    standardized_probe_adam,
)
from hf_immunize.attacks.context import AttackContext, Role, describe_model, load_classifier, load_processor
from hf_immunize.attacks.plan import parse_settings, plan_runs
from hf_immunize.attacks.shape import Attack, Result, Run, evaluation_steps
from hf_immunize.attacks.suite import SuiteSummary, run_suite

ATTACKS: dict[str, Attack] = {
    "linear_probe_gd": linear_probe_gd.ATTACK,
    "linear_probe_adam": linear_probe_adam.ATTACK,
    "standardized_probe_adam": standardized_probe_adam.ATTACK,
    "ridge_probe": ridge_probe.ATTACK,
    "lora": lora.ATTACK,
    "full_finetune": full_finetune.ATTACK,
}

__all__ = [
    "ATTACKS",
    "Attack",
    "AttackContext",
    "Result",
    "Role",
    "Run",
    "SuiteSummary",
    "describe_model",
    "evaluation_steps",
    "load_classifier",
    "load_processor",
    "parse_settings",
    "plan_runs",
    "run_suite",
]
