"""Full fine-tuning on a handful of images per class: the attacker who has hardly any data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hf_immunize.attacks.core.shape import Attack, setting
from hf_immunize.attacks.vision._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.vision.full_finetune import unfrozen


@dataclass(frozen=True)
class FewShotFinetune(FinetuneConfig):
    """AdamW on all weights and a new head, on few images per class."""

    learning_rate: float = setting(1e-3, "Peak learning rate.", sweep=(1e-5, 1e-4, 1e-3, 1e-2))
    shots: int = setting(20, "Images per class.")


@dataclass(frozen=True)
class FiveShotFinetune(FewShotFinetune):
    """AdamW on all weights and a new head, on five images per class."""

    shots: int = setting(5, "Images per class.")


@dataclass(frozen=True)
class OneShotFinetune(FewShotFinetune):
    """AdamW on all weights and a new head, on one image per class."""

    shots: int = setting(1, "Images per class.")


ATTACK = Attack(config=FewShotFinetune, run=partial(run_finetunes, prepare=unfrozen), family="data", own_threshold=True)
FIVE = Attack(config=FiveShotFinetune, run=partial(run_finetunes, prepare=unfrozen), family="data", own_threshold=True)
ONE = Attack(config=OneShotFinetune, run=partial(run_finetunes, prepare=unfrozen), family="data", own_threshold=True)
