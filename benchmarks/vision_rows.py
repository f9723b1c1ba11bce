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
        "learning_rate": 6e-4,
        "max_steps": 320,
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
_FARTHER = {"learning_rate": 1e-3, "feature_distillation": 6.0}
_ON_DINOV2 = _ADVERSARY | _FARTHER | {"strength": 10.0}
OF_BACKBONE: dict[str, dict[str, dict[str, Any]]] = {
    "mobilenetv2": {},
    "dinov2": {
        OURS: _ON_DINOV2,
        "condition_number": {"strength": 0.1},
        "opt_kappa": {"strength": 0.1},
        "ill_only": {"strength": 0.1},
        "imma": _FARTHER | {"strength": 10.0},
    },
}
"""Where a row of one backbone differs from ROWS and SHARED."""

_MANY = {"per_device_harmful_batch_size": 128, "harmful_classes_per_batch": 10}
FRONTIER: dict[str, dict[str, dict[str, Any]]] = {
    "mobilenetv2": {
        "closed_form_adversary strength=0.5": _ADVERSARY | {"strength": 0.5},
        "closed_form_adversary strength=0.1": _ADVERSARY | {"strength": 0.1},
    },
    "dinov2": {
        "closed_form_adversary strength=2, rate=2e-4, steps=120": _ADVERSARY
        | {"strength": 2.0, "learning_rate": 2e-4, "max_steps": 120},
        "closed_form_adversary horizons=30,300,3000, rows=128": _ON_DINOV2 | _MANY | {"horizon": "30,300,3000"},
        "closed_form_adversary steps=960": _ON_DINOV2 | {"max_steps": 960},
        "closed_form_adversary horizons=30,300,3000, rows=128, steps=960": _ON_DINOV2
        | _MANY
        | {"horizon": "30,300,3000", "max_steps": 960},
        "closed_form_adversary sites=head and fc1": _ON_DINOV2 | {"sites": "classifier,blocks.0.mlp.fc1"},
        "closed_form_adversary and imma": _ON_DINOV2 | {"objective": f"{OURS}+imma"},
        "imma strength=30": _FARTHER | {"objective": "imma", "weight": "1", "strength": 30.0},
        "condition_number strength=0.5, rate=1e-3, steps=240": {
            "objective": "condition_number",
            "strength": 0.5,
            "learning_rate": 1e-3,
            "max_steps": 240,
            "feature_distillation": 6.0,
        },
        "condition_number strength=0.3, rate=8e-4, steps=280": {
            "objective": "condition_number",
            "strength": 0.3,
            "learning_rate": 8e-4,
            "max_steps": 280,
            "feature_distillation": 6.0,
        },
    },
}
"""More points of the frontier of primary accuracy against harmful accuracy; run only when named."""


def options_of(row: str, backbone: str) -> dict[str, Any]:
    """Options of ImmunizationConfig of one row."""
    if row == "init":
        return {}
    if row in FRONTIER[backbone]:
        return SHARED[backbone] | FRONTIER[backbone][row]
    return SHARED[backbone] | ROWS[row] | OF_BACKBONE[backbone].get(row, {})
