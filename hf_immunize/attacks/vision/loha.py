"""LoHa through PEFT: a Hadamard product of two low-rank updates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from peft import LoHaConfig

from hf_immunize.attacks.core.shape import Attack, setting
from hf_immunize.attacks.vision._peft import AdapterConfig, run_adapters


@dataclass(frozen=True)
class Loha(AdapterConfig):
    """AdamW on Hadamard-product updates (Hyeon-Woo et al. 2022), and on a new head."""

    rank: int = setting(8, "Rank of each factor.")


def make_config(config: Loha, targets: list[str]) -> LoHaConfig:
    """PEFT's config of this run."""
    return LoHaConfig(r=config.rank, alpha=config.rank, target_modules=targets)


ATTACK = Attack(config=Loha, run=partial(run_adapters, make=make_config), family="other PEFT")
