"""Full fine-tuning on mislabelled and noisy images: the attacker whose data is bad."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hf_immunize.attacks._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.context import AttackContext
from hf_immunize.attacks.full_finetune import unfrozen
from hf_immunize.attacks.shape import Attack, Result, Run


@dataclass(frozen=True)
class NoisyFinetune(FinetuneConfig):
    """AdamW on all weights and a new head, with label noise and pixel noise."""

    learning_rate: float = field(
        default=1e-3, metadata={"help": "Peak learning rate.", "sweep": (1e-5, 1e-4, 1e-3, 1e-2)}
    )
    label_noise: float = field(default=0.2, metadata={"help": "Share of training rows with a random label."})
    pixel_noise: float = field(
        default=0.1, metadata={"help": "Standard deviation of noise on training pixels, in units of theirs."}
    )


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One Trainer per run."""
    yield from run_finetunes(context, runs, unfrozen)


ATTACK = Attack(config=NoisyFinetune, run=run, family="data")
