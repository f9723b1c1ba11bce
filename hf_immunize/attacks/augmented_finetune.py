"""Full fine-tuning on augmented images: the attacker who stretches the data by flips, shifts, jitter and erasing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hf_immunize.attacks._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.context import AttackContext
from hf_immunize.attacks.full_finetune import unfrozen
from hf_immunize.attacks.shape import Attack, Result, Run


@dataclass(frozen=True)
class AugmentedFinetune(FinetuneConfig):
    """AdamW on all weights and a new head; every batch is augmented anew by tensor operations."""

    learning_rate: float = field(
        default=1e-3, metadata={"help": "Peak learning rate.", "sweep": (1e-5, 1e-4, 1e-3, 1e-2)}
    )
    flip: bool = field(default=True, metadata={"help": "Mirror half of the images."})
    crop: float = field(default=0.125, metadata={"help": "Shift by up to this share of the side, edges repeated."})
    jitter: float = field(default=0.2, metadata={"help": "Contrast in 1 ± jitter, brightness in ± jitter deviations."})
    erase: float = field(default=0.25, metadata={"help": "Side of a blanked square as a share of the image's."})


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One Trainer per run."""
    yield from run_finetunes(context, runs, unfrozen)


ATTACK = Attack(config=AugmentedFinetune, run=run, family="data")
