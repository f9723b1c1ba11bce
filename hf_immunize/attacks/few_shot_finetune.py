"""Full fine-tuning on a handful of images per class: the attacker who has hardly any data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hf_immunize.attacks._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.context import AttackContext
from hf_immunize.attacks.full_finetune import unfrozen
from hf_immunize.attacks.shape import Attack, Result, Run


@dataclass(frozen=True)
class FewShotFinetune(FinetuneConfig):
    """AdamW on all weights and a new head, on few images per class."""

    learning_rate: float = field(
        default=1e-3, metadata={"help": "Peak learning rate.", "sweep": (1e-5, 1e-4, 1e-3, 1e-2)}
    )
    shots: int = field(default=20, metadata={"help": "Images per class."})


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One Trainer per run."""
    yield from run_finetunes(context, runs, unfrozen)


@dataclass(frozen=True)
class FiveShotFinetune(FewShotFinetune):
    """AdamW on all weights and a new head, on five images per class."""

    shots: int = field(default=5, metadata={"help": "Images per class."})


@dataclass(frozen=True)
class OneShotFinetune(FewShotFinetune):
    """AdamW on all weights and a new head, on one image per class."""

    shots: int = field(default=1, metadata={"help": "Images per class."})


ATTACK = Attack(config=FewShotFinetune, run=run, family="data", own_threshold=True)
FIVE = Attack(config=FiveShotFinetune, run=run, family="data", own_threshold=True)
ONE = Attack(config=OneShotFinetune, run=run, family="data", own_threshold=True)
