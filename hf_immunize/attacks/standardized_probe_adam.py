"""Linear probing by Adam on standardized features: a diagonal preconditioner that costs the attacker one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hf_immunize.attacks._probes import adam, run_probes
from hf_immunize.attacks.context import AttackContext
from hf_immunize.attacks.shape import Attack, Result, Run


@dataclass(frozen=True)
class StandardizedProbeAdam:
    """Full-batch Adam on cross-entropy, with a bias, on features of mean 0 and standard deviation 1 per column."""

    learning_rate: float = field(
        default=1e-2,
        metadata={"help": "Adam's step size.", "sweep": (1e-3, 1e-2, 1e-1, 1.0)},
    )
    steps: int = field(default=2000, metadata={"help": "Budget in Adam steps."})
    features: str = field(default="standardized", metadata={"help": "Feature map fitted on the training rows."})


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """Train every run as one tensor program."""
    yield from run_probes(context, runs, adam)


ATTACK = Attack(config=StandardizedProbeAdam, run=run, family="whitened probing", batched=True)
