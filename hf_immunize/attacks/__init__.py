"""Adversaries: one file each, one plain table. None of them knows how a model was defended."""

from hf_immunize.attacks import (
    batchnorm_probe,
    dora,
    earlier_layer_probe,
    few_shot_finetune,
    full_finetune,
    ia3,
    lbfgs_probe,
    linear_probe_adam,
    linear_probe_gd,
    linear_probe_momentum,
    loha,
    lokr,
    lora,
    muon_finetune,
    noisy_finetune,
    oft,
    partial_finetune,
    reset_last_blocks,
    ridge_head_finetune,
    ridge_probe,
    standardized_probe_adam,
    vera,
    whitened_probe_gd,
)
from hf_immunize.attacks.context import AttackContext, Role, describe_model, load_classifier, load_processor
from hf_immunize.attacks.plan import parse_settings, plan_runs
from hf_immunize.attacks.shape import Attack, Result, Run, evaluation_steps
from hf_immunize.attacks.suite import SuiteSummary, run_suite

ATTACKS: dict[str, Attack] = {
    "linear_probe_gd": linear_probe_gd.ATTACK,
    "linear_probe_momentum": linear_probe_momentum.ATTACK,
    "linear_probe_adam": linear_probe_adam.ATTACK,
    "standardized_probe_adam": standardized_probe_adam.ATTACK,
    "whitened_probe_gd": whitened_probe_gd.ATTACK,
    "lbfgs_probe": lbfgs_probe.ATTACK,
    "ridge_probe": ridge_probe.ATTACK,
    "earlier_layer_probe": earlier_layer_probe.ATTACK,
    "batchnorm_probe": batchnorm_probe.ATTACK,
    "lora": lora.ATTACK,
    "dora": dora.ATTACK,
    "loha": loha.ATTACK,
    "lokr": lokr.ATTACK,
    "oft": oft.ATTACK,
    "ia3": ia3.ATTACK,
    "vera": vera.ATTACK,
    "partial_finetune": partial_finetune.ATTACK,
    "full_finetune": full_finetune.ATTACK,
    "ridge_head_finetune": ridge_head_finetune.ATTACK,
    "muon_finetune": muon_finetune.ATTACK,
    "reset_last_blocks": reset_last_blocks.ATTACK,
    "few_shot_finetune": few_shot_finetune.ATTACK,
    "noisy_finetune": noisy_finetune.ATTACK,
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
