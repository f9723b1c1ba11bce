"""LoKr through PEFT: a Kronecker product, which can be of full rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from peft import LoKrConfig

from hf_immunize.attacks._peft import AdapterConfig, run_adapters
from hf_immunize.attacks.context import AttackContext
from hf_immunize.attacks.shape import Attack, Result, Run


@dataclass(frozen=True)
class Lokr(AdapterConfig):
    """AdamW on Kronecker-product updates (Yeh et al. 2024), and on a new head."""

    rank: int = field(default=8, metadata={"help": "Rank of the factors."})


def make_config(config: Lokr, targets: list[str]) -> LoKrConfig:
    """PEFT's config of this run."""
    return LoKrConfig(r=config.rank, alpha=config.rank, target_modules=targets)


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One Trainer per run."""
    yield from run_adapters(context, runs, make_config)


ATTACK = Attack(config=Lokr, run=run, family="other PEFT")
