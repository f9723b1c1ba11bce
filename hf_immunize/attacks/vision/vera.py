"""VeRA through PEFT: shared random projections with trained scales."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from peft import VeraConfig

from hf_immunize.attacks.core.shape import Attack, setting
from hf_immunize.attacks.vision._peft import AdapterConfig, run_adapters


@dataclass(frozen=True)
class Vera(AdapterConfig):
    """AdamW on vectors that scale shared random low-rank projections (Kopiczko et al. 2024), and on a new head."""

    rank: int = setting(64, "Rank of the shared projections.")


def make_config(config: Vera, targets: list[str]) -> VeraConfig:
    """PEFT's config of this run."""
    return VeraConfig(r=config.rank, target_modules=targets)


ATTACK = Attack(config=Vera, run=partial(run_adapters, make=make_config), family="other PEFT")
