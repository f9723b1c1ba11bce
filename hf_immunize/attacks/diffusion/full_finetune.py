"""Full fine-tuning of a denoiser: every weight is the attacker's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from hf_immunize.attacks.diffusion._finetune import DiffusionFinetune, run_finetunes
from hf_immunize.attacks.diffusion.context import DiffusionAttackContext
from hf_immunize.attacks.shape import Attack, Result, Run


@dataclass(frozen=True)
class DiffusionFullFinetune(DiffusionFinetune):
    """AdamW on all weights of the denoiser."""


def run(context: DiffusionAttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One loop per run."""
    yield from run_finetunes(context, runs, unfrozen)


def unfrozen(context: DiffusionAttackContext, planned: Run) -> nn.Module:
    """The attacked denoiser with every weight trained."""
    return context.model(planned.seed).requires_grad_(True)


ATTACK = Attack(config=DiffusionFullFinetune, run=run, family="full fine-tuning")
