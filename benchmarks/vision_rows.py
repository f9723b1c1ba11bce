"""The rows of vision_transfer.py: which objective, how strong, and what all rows of a backbone share."""

from __future__ import annotations

from typing import Any

CONTROL = "plain fine-tuning"
OURS = "closed_form_adversary"

_EVERY: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.0,
    "max_grad_norm": 5.0,
    "primary_loss_weight": 0.0,
    "distillation": 10.0,
    "feature_distillation": 9.0,
}
SHARED: dict[str, dict[str, Any]] = {
    "mobilenetv2": _EVERY
    | {
        "learning_rate": 5e-4,
        "max_steps": 240,
        "per_device_train_batch_size": 64,
        "per_device_harmful_batch_size": 64,
        "harmful_classes_per_batch": 8,
    },
    "dinov2": _EVERY
    | {
        "learning_rate": 2e-4,
        "max_steps": 120,
        "per_device_train_batch_size": 32,
        "per_device_harmful_batch_size": 48,
        "harmful_classes_per_batch": 6,
    },
}

_ADVERSARY = {"objective": OURS, "weight": "1", "horizon": "30,300", "memorization": 0.5}
ROWS: dict[str, dict[str, Any]] = {
    "init": {},
    CONTROL: {
        "objective": "ill_only",
        "strength": 0.0,
        "primary_loss_weight": 1.0,
        "distillation": 0.0,
        "feature_distillation": 0.0,
    },
    OURS: _ADVERSARY | {"strength": 2.0},
    "condition_number": {"objective": "condition_number", "strength": 1.0},
    "opt_kappa": {"objective": "opt_kappa", "strength": 1.0},
    "ill_only": {"objective": "ill_only", "strength": 1.0},
    "imma": {"objective": "imma", "weight": "1", "strength": 2.0},
}
FRONTIER: dict[str, dict[str, Any]] = {
    "closed_form_adversary weight=0.5": _ADVERSARY | {"strength": 0.5},
    "closed_form_adversary weight=0.1": _ADVERSARY | {"strength": 0.1},
    "closed_form_adversary no feature distillation": _ADVERSARY | {"strength": 2.0, "feature_distillation": 0.0},
    "condition_number long": {
        "objective": "condition_number",
        "strength": 0.5,
        "learning_rate": 1e-3,
        "max_steps": 240,
        "feature_distillation": 6.0,
    },
    "condition_number gentle": {
        "objective": "condition_number",
        "strength": 0.3,
        "learning_rate": 8e-4,
        "max_steps": 280,
        "feature_distillation": 6.0,
    },
    "condition_number gentlest": {
        "objective": "condition_number",
        "strength": 0.1,
        "learning_rate": 6e-4,
        "max_steps": 320,
    },
    "plain fine-tuning long": ROWS[CONTROL] | {"learning_rate": 6e-4, "max_steps": 320},
    "closed_form_adversary long": _ADVERSARY
    | {"strength": 10.0, "learning_rate": 1e-3, "max_steps": 320, "feature_distillation": 6.0},
}
"""More points of the frontier of primary accuracy against harmful accuracy; run only when named."""


def options_of(row: str, backbone: str) -> dict[str, Any]:
    """Options of ImmunizationConfig of one row."""
    return SHARED[backbone] | (ROWS | FRONTIER)[row] if row != "init" else {}
