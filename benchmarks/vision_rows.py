"""The rows of vision_transfer.py: which objective, how strong, and what all rows share."""

from __future__ import annotations

from typing import Any

SHARED: dict[str, Any] = {
    "per_device_train_batch_size": 64,
    "per_device_harmful_batch_size": 64,
    "harmful_classes_per_batch": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.0,
    "max_grad_norm": 5.0,
    "primary_loss_weight": 0.0,
    "distillation": 10.0,
    "feature_distillation": 5.0,
}
