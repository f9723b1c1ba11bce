"""IA3 through PEFT: one scale per output, a few hundred parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from peft import IA3Config

from hf_immunize.attacks.core.shape import Attack
from hf_immunize.attacks.vision._peft import AdapterConfig, run_adapters


@dataclass(frozen=True)
class IA3(AdapterConfig):
    """AdamW on rescaled activations of the targeted layers (Liu et al. 2022), and on a new head."""


def make_config(config: IA3, targets: list[str]) -> IA3Config:
    """PEFT's config of this run."""
    return IA3Config(target_modules=targets, feedforward_modules=[])


ATTACK = Attack(config=IA3, run=partial(run_adapters, make=make_config), family="other PEFT")
