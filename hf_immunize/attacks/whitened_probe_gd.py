"""Gradient descent on whitened features: an attacker who spends one decomposition to undo any condition number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hf_immunize.attacks._probes import gradient_descent, run_probes
from hf_immunize.attacks.context import AttackContext
from hf_immunize.attacks.shape import Attack, Result, Run


@dataclass(frozen=True)
class WhitenedProbeGD:
    """Full-batch gradient descent on cross-entropy, with a bias, on features of identity second moment."""

    learning_rate: float = field(
        default=1.0, metadata={"help": "Step size; the stability limit is at 4.", "sweep": (0.01, 0.1, 1.0, 4.0, 16.0)}
    )
    steps: int = field(default=2000, metadata={"help": "Budget in gradient steps."})
    features: str = field(default="whitened", metadata={"help": "Feature map fitted on the training rows."})


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """Train every run as one tensor program."""
    yield from run_probes(context, runs, gradient_descent)


ATTACK = Attack(config=WhitenedProbeGD, run=run, family="whitened probing", batched=True)
