"""LoHa through PEFT: a Hadamard product of two low-rank updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from peft import LoHaConfig

from hf_immunize.attacks._peft import AdapterConfig, run_adapters
from hf_immunize.attacks.context import AttackContext
from hf_immunize.attacks.shape import Attack, Result, Run


@dataclass(frozen=True)
class Loha(AdapterConfig):
    """AdamW on Hadamard-product updates (Hyeon-Woo et al. 2022), and on a new head."""

    rank: int = field(default=8, metadata={"help": "Rank of each factor."})


def make_config(config: Loha, targets: list[str]) -> LoHaConfig:
    """PEFT's config of this run."""
    return LoHaConfig(r=config.rank, alpha=config.rank, target_modules=targets)


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One Trainer per run."""
    yield from run_adapters(context, runs, make_config)


ATTACK = Attack(config=Loha, run=run, family="other PEFT")
