"""Linear probing by gradient descent with momentum: the condition number counts by its square root."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hf_immunize.attacks.core.shape import Attack, setting
from hf_immunize.attacks.vision._probes import momentum, run_probes


@dataclass(frozen=True)
class LinearProbeMomentum:
    """Full-batch Nesterov momentum on cross-entropy, with a bias, on centred features; rates as in linear_probe_gd."""

    learning_rate: float = setting(4.0, "Step size in units of 1/λ₁ of the centred features.",
                                   sweep=(0.1, 1.0, 4.0, 16.0, 64.0, 256.0))
    steps: int = setting(5000, "Budget in steps.")
    features: str = setting("centered", "Feature map: raw, centered, standardized, whitened.")


ATTACK = Attack(
    config=LinearProbeMomentum, run=partial(run_probes, optimizer=momentum), family="linear probing", batched=True,
)
