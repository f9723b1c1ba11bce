"""Full fine-tuning: every weight is the attacker's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from hf_immunize.attacks.core.shape import Attack, Run, setting
from hf_immunize.attacks.vision._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.vision.context import AttackContext


@dataclass(frozen=True)
class FullFinetune(FinetuneConfig):
    """AdamW on all weights, with a new head for the harmful classes."""

    learning_rate: float = setting(1e-3, "Peak learning rate.", sweep=(1e-5, 1e-4, 1e-3, 1e-2))


def unfrozen(context: AttackContext, planned: Run) -> nn.Module:
    """The attacked model with a new head and every weight trained."""
    return context.model_with_new_head(planned.seed).requires_grad_(True)


ATTACK = Attack(config=FullFinetune, run=partial(run_finetunes, prepare=unfrozen), family="full fine-tuning")
