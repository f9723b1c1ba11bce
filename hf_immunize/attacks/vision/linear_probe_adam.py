"""Linear probing by Adam on the features as they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hf_immunize.attacks.core.shape import Attack, setting
from hf_immunize.attacks.vision._probes import adam, run_probes


@dataclass(frozen=True)
class LinearProbeAdam:
    """Full-batch Adam on cross-entropy, with a bias, on raw features; rates are absolute, as in torch.optim.Adam."""

    learning_rate: float = setting(1e-2, "Adam's step size.", sweep=(1e-3, 1e-2, 1e-1, 1.0, 10.0))
    steps: int = setting(2000, "Budget in Adam steps.")
    features: str = setting("raw", "Feature map: raw, centered, standardized, whitened.")


ATTACK = Attack(config=LinearProbeAdam, run=partial(run_probes, optimizer=adam), family="linear probing", batched=True)
