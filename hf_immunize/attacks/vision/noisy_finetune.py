"""Full fine-tuning on mislabelled and noisy images: the attacker whose data is bad."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hf_immunize.attacks.core.shape import Attack, setting
from hf_immunize.attacks.vision._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.vision.full_finetune import unfrozen


@dataclass(frozen=True)
class NoisyFinetune(FinetuneConfig):
    """AdamW on all weights and a new head, with label noise and pixel noise."""

    learning_rate: float = setting(1e-3, "Peak learning rate.", sweep=(1e-5, 1e-4, 1e-3, 1e-2))
    label_noise: float = setting(0.2, "Share of training rows with a random label.")
    pixel_noise: float = setting(0.1, "Standard deviation of noise on training pixels, in units of theirs.")


ATTACK = Attack(config=NoisyFinetune, run=partial(run_finetunes, prepare=unfrozen), family="data")
