"""IA3 through PEFT: one scale per output, a few hundred parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peft import IA3Config

from hf_immunize.attacks._peft import AdapterConfig, run_adapters
from hf_immunize.attacks.context import AttackContext
from hf_immunize.attacks.shape import Attack, Result, Run


@dataclass(frozen=True)
class IA3(AdapterConfig):
    """AdamW on rescaled activations of the targeted layers (Liu et al. 2022), and on a new head."""


def make_config(config: IA3, targets: list[str]) -> IA3Config:
    """PEFT's config of this run."""
    return IA3Config(target_modules=targets, feedforward_modules=[])


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One Trainer per run."""
    yield from run_adapters(context, runs, make_config)


ATTACK = Attack(config=IA3, run=run, family="other PEFT")
