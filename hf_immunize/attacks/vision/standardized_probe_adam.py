"""Linear probing by Adam on standardized features: a diagonal preconditioner that costs the attacker one line."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hf_immunize.attacks.core.shape import Attack, setting
from hf_immunize.attacks.vision._probes import adam, run_probes


@dataclass(frozen=True)
class StandardizedProbeAdam:
    """Full-batch Adam on cross-entropy, with a bias, on features of mean 0 and standard deviation 1 per column."""

    learning_rate: float = setting(1e-2, "Adam's step size.", sweep=(1e-3, 1e-2, 1e-1, 1.0))
    steps: int = setting(2000, "Budget in Adam steps.")
    features: str = setting("standardized", "Feature map fitted on the training rows.")


ATTACK = Attack(
    config=StandardizedProbeAdam, run=partial(run_probes, optimizer=adam), family="whitened probing", batched=True,
)
