"""VeRA through PEFT: shared random projections with trained scales."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from peft import VeraConfig

from hf_immunize.attacks._peft import AdapterConfig, run_adapters
from hf_immunize.attacks.context import AttackContext
from hf_immunize.attacks.shape import Attack, Result, Run


@dataclass(frozen=True)
class Vera(AdapterConfig):
    """AdamW on vectors that scale shared random low-rank projections (Kopiczko et al. 2024), and on a new head."""

    rank: int = field(default=64, metadata={"help": "Rank of the shared projections."})


def make_config(config: Vera, targets: list[str]) -> VeraConfig:
    """PEFT's config of this run."""
    return VeraConfig(r=config.rank, target_modules=targets)


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One Trainer per run."""
    yield from run_adapters(context, runs, make_config)


ATTACK = Attack(config=Vera, run=run, family="other PEFT")
