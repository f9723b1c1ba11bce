"""Gradient descent on whitened features: an attacker who spends one decomposition to undo any condition number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hf_immunize.attacks.core.shape import Attack, setting
from hf_immunize.attacks.vision._probes import gradient_descent, run_probes


@dataclass(frozen=True)
class WhitenedProbeGD:
    """Full-batch gradient descent on cross-entropy, with a bias, on features of identity second moment."""

    learning_rate: float = setting(1.0, "Step size; the stability limit is at 4.", sweep=(0.01, 0.1, 1.0, 4.0, 16.0))
    steps: int = setting(2000, "Budget in gradient steps.")
    features: str = setting("whitened", "Feature map fitted on the training rows.")


ATTACK = Attack(
    config=WhitenedProbeGD, run=partial(run_probes, optimizer=gradient_descent), family="whitened probing",
    batched=True,
)
