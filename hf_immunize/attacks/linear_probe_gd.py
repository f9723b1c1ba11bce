"""Linear probing by plain gradient descent: the attacker that condition numbers are about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hf_immunize.attacks._probes import gradient_descent, run_probes
from hf_immunize.attacks.context import AttackContext
from hf_immunize.attacks.shape import Attack, Result, Run


@dataclass(frozen=True)
class LinearProbeGD:
    """Full-batch gradient descent on cross-entropy, with a bias, on centred features divided by one scalar.

    Rates are in units of 1/λ₁, λ₁ the largest eigenvalue of the centred second moment. Cross-entropy's Hessian is at
    most λ₁/2, so descent is certain below 4; above, it may oscillate and still be faster, so the sweep goes far
    beyond. In these units the sweep means the same for features of any scale or offset: a defender who multiplies
    or shifts features gains nothing by it.
    """

    learning_rate: float = field(
        default=4.0,
        metadata={
            "help": "Step size in units of 1/λ₁ of the centred features; the stability limit is at 4.",
            "sweep": (0.1, 1.0, 4.0, 16.0, 64.0, 256.0, 1024.0),
        },
    )
    steps: int = field(default=20000, metadata={"help": "Budget in gradient steps."})
    features: str = field(default="centered", metadata={"help": "Feature map: raw, centered, standardized, whitened."})


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """Train every run as one tensor program."""
    yield from run_probes(context, runs, gradient_descent)


ATTACK = Attack(config=LinearProbeGD, run=run, family="linear probing", batched=True)
