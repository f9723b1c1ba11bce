"""Linear probing by plain gradient descent: the attacker that condition numbers are about."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hf_immunize.attacks.core.shape import Attack, setting
from hf_immunize.attacks.vision._probes import gradient_descent, run_probes


@dataclass(frozen=True)
class LinearProbeGD:
    """Full-batch gradient descent on cross-entropy, with a bias, on centred features divided by one scalar.

    Rates are in units of 1/λ₁, λ₁ the largest eigenvalue of the centred second moment. Cross-entropy's Hessian is at
    most λ₁/2, so descent is certain below 4; above, it may oscillate and still be faster, so the sweep goes far
    beyond. In these units the sweep means the same for features of any scale or offset: a defender who multiplies
    or shifts features gains nothing by it.
    """

    learning_rate: float = setting(4.0, "Step size in units of 1/λ₁ of the centred features; the stability limit is at "
                                   "4.", sweep=(0.1, 1.0, 4.0, 16.0, 64.0, 256.0, 1024.0))
    steps: int = setting(20000, "Budget in gradient steps.")
    features: str = setting("centered", "Feature map: raw, centered, standardized, whitened.")


ATTACK = Attack(
    config=LinearProbeGD, run=partial(run_probes, optimizer=gradient_descent), family="linear probing", batched=True,
)
