"""Full fine-tuning: every weight is the attacker's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from hf_immunize.attacks._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.context import AttackContext
from hf_immunize.attacks.shape import Attack, Result, Run


@dataclass(frozen=True)
class FullFinetune(FinetuneConfig):
    """AdamW on all weights, with a new head for the harmful classes."""

    learning_rate: float = field(
        default=1e-3, metadata={"help": "Peak learning rate.", "sweep": (1e-5, 1e-4, 1e-3, 1e-2)}
    )


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One Trainer per run."""
    yield from run_finetunes(context, runs, unfrozen)


def unfrozen(context: AttackContext, planned: Run) -> nn.Module:
    """The attacked model with a new head and every weight trained."""
    return context.model_with_new_head(planned.seed).requires_grad_(True)


ATTACK = Attack(config=FullFinetune, run=run, family="full fine-tuning")
