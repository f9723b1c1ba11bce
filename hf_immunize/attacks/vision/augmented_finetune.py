"""Full fine-tuning on augmented images: the attacker who stretches the data by flips, shifts, jitter and erasing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hf_immunize.attacks.core.shape import Attack, setting
from hf_immunize.attacks.vision._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.vision.full_finetune import unfrozen


@dataclass(frozen=True)
class AugmentedFinetune(FinetuneConfig):
    """AdamW on all weights and a new head; every batch is augmented anew by tensor operations."""

    learning_rate: float = setting(1e-3, "Peak learning rate.", sweep=(1e-5, 1e-4, 1e-3, 1e-2))
    flip: bool = setting(True, "Mirror half of the images.")
    crop: float = setting(0.125, "Shift by up to this share of the side, edges repeated.")
    jitter: float = setting(0.2, "Contrast in 1 ± jitter, brightness in ± jitter deviations.")
    erase: float = setting(0.25, "Side of a blanked square as a share of the image's.")


ATTACK = Attack(config=AugmentedFinetune, run=partial(run_finetunes, prepare=unfrozen), family="data")
