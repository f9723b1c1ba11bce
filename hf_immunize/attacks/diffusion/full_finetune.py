"""Full fine-tuning of a denoiser: every weight is the attacker's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from hf_immunize.attacks.core.shape import Attack, Run
from hf_immunize.attacks.diffusion._finetune import DiffusionFinetune, run_finetunes
from hf_immunize.attacks.diffusion.context import DiffusionAttackContext


@dataclass(frozen=True)
class DiffusionFullFinetune(DiffusionFinetune):
    """AdamW on all weights of the denoiser."""


def unfrozen(context: DiffusionAttackContext, planned: Run) -> nn.Module:
    """The attacked denoiser with every weight trained."""
    return context.model(planned.seed).requires_grad_(True)


ATTACK = Attack(
    config=DiffusionFullFinetune, run=partial(run_finetunes, prepare=unfrozen), family="full fine-tuning",
    covers="a defence of the attention layers alone",
)
