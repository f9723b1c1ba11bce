"""Adversaries of image classifiers: one row of a table or one short file each, and one plain table of all."""

from dataclasses import replace

from hf_immunize.attacks.core.shape import Attack
from hf_immunize.attacks.vision import (
    all_layers_probe,
    batchnorm_probe,
    distil_fresh,
    earlier_layer_probe,
    fold_linear_map,
    lbfgs_probe,
    lora,
    ridge_probe,
    subtract_difference,
)
from hf_immunize.attacks.vision.adapters import ADAPTERS
from hf_immunize.attacks.vision.context import AttackContext, describe_model
from hf_immunize.attacks.vision.finetunes import FINETUNES
from hf_immunize.attacks.vision.linear_probes import LINEAR_PROBES
from hf_immunize.attacks.vision.without_model import REFERENCES

ATTACKS: dict[str, Attack] = {
    **LINEAR_PROBES,
    "lbfgs_probe": lbfgs_probe.ATTACK,
    "ridge_probe": ridge_probe.ATTACK,
    "earlier_layer_probe": earlier_layer_probe.ATTACK,
    "all_layers_probe": all_layers_probe.ATTACK,
    "batchnorm_probe": batchnorm_probe.ATTACK,
    "lora": lora.ATTACK,
    **ADAPTERS,
    **FINETUNES,
    "fold_linear_map": fold_linear_map.ATTACK,
    "subtract_difference": subtract_difference.ATTACK,
    "distil_fresh": distil_fresh.ATTACK,
}

TRAINABILITY: dict[str, Attack] = {
    f"benign_{name}": replace(ATTACKS[key], family="benign trainability", needs=())
    for name, key in (("probe", "linear_probe_adam"), ("lora", "lora"), ("full_finetune", "full_finetune"))
}
"""No attacks: how a benign third task would be learned, which immunization must not hinder."""


__all__ = ["ATTACKS", "REFERENCES", "TRAINABILITY", "AttackContext", "describe_model"]
