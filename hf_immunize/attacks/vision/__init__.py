"""Adversaries of image classifiers: one file each, one plain table."""

from dataclasses import replace

from hf_immunize.attacks.core.shape import Attack
from hf_immunize.attacks.vision import (
    augmented_finetune,
    batchnorm_probe,
    distil_fresh,
    earlier_layer_probe,
    few_shot_finetune,
    fold_linear_map,
    full_finetune,
    lbfgs_probe,
    linear_probe_adam,
    linear_probe_gd,
    linear_probe_momentum,
    lora,
    mixed_finetune,
    muon_finetune,
    noisy_finetune,
    partial_finetune,
    reset_last_blocks,
    ridge_head_finetune,
    ridge_probe,
    standardized_probe_adam,
    subtract_difference,
    whitened_probe_gd,
)
from hf_immunize.attacks.vision.adapters import ADAPTERS
from hf_immunize.attacks.vision.context import AttackContext, describe_model
from hf_immunize.attacks.vision.without_model import REFERENCES

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
    **ADAPTERS,
    "partial_finetune": partial_finetune.ATTACK,
    "full_finetune": full_finetune.ATTACK,
    "ridge_head_finetune": ridge_head_finetune.ATTACK,
    "muon_finetune": muon_finetune.ATTACK,
    "reset_last_blocks": reset_last_blocks.ATTACK,
    "fold_linear_map": fold_linear_map.ATTACK,
    "subtract_difference": subtract_difference.ATTACK,
    "distil_fresh": distil_fresh.ATTACK,
    "few_shot_finetune": few_shot_finetune.ATTACK,
    "five_shot_finetune": few_shot_finetune.FIVE,
    "one_shot_finetune": few_shot_finetune.ONE,
    "mixed_finetune": mixed_finetune.ATTACK,
    "augmented_finetune": augmented_finetune.ATTACK,
    "noisy_finetune": noisy_finetune.ATTACK,
}

TRAINABILITY: dict[str, Attack] = {
    f"benign_{name}": replace(ATTACKS[key], family="benign trainability", needs=())
    for name, key in (("probe", "linear_probe_adam"), ("lora", "lora"), ("full_finetune", "full_finetune"))
}
"""No attacks: how a benign third task would be learned, which immunization must not hinder."""

__all__ = ["ATTACKS", "REFERENCES", "TRAINABILITY", "AttackContext", "describe_model"]
