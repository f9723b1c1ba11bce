"""Linear probing by gradient descent with momentum: the condition number counts by its square root."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hf_immunize.attacks._probes import momentum, run_probes
from hf_immunize.attacks.context import AttackContext
from hf_immunize.attacks.shape import Attack, Result, Run


@dataclass(frozen=True)
class LinearProbeMomentum:
    """Full-batch Nesterov momentum on cross-entropy, with a bias, on centred features; rates as in linear_probe_gd."""

    learning_rate: float = field(
        default=4.0,
        metadata={
            "help": "Step size in units of 1/λ₁ of the centred features.",
            "sweep": (0.1, 1.0, 4.0, 16.0, 64.0, 256.0),
        },
    )
    steps: int = field(default=5000, metadata={"help": "Budget in steps."})
    features: str = field(default="centered", metadata={"help": "Feature map: raw, centered, standardized, whitened."})


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """Train every run as one tensor program."""
    yield from run_probes(context, runs, momentum)


ATTACK = Attack(config=LinearProbeMomentum, run=run, family="linear probing", batched=True)
