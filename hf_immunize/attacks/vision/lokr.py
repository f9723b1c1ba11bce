"""LoKr through PEFT: a Kronecker product, which can be of full rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from peft import LoKrConfig

from hf_immunize.attacks.core.shape import Attack, setting
from hf_immunize.attacks.vision._peft import AdapterConfig, run_adapters


@dataclass(frozen=True)
class Lokr(AdapterConfig):
    """AdamW on Kronecker-product updates (Yeh et al. 2024), and on a new head."""

    rank: int = setting(8, "Rank of the factors.")


def make_config(config: Lokr, targets: list[str]) -> LoKrConfig:
    """PEFT's config of this run."""
    return LoKrConfig(r=config.rank, alpha=config.rank, target_modules=targets)


ATTACK = Attack(config=Lokr, run=partial(run_adapters, make=make_config), family="other PEFT")
