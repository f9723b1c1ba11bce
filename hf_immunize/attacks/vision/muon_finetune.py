"""Full fine-tuning with Muon: an orthogonalised, hence preconditioned, update of every weight matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hf_immunize.attacks.core.shape import Attack, setting
from hf_immunize.attacks.vision._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.vision.full_finetune import unfrozen


@dataclass(frozen=True)
class MuonFinetune(FinetuneConfig):
    """``torch.optim.Muon`` on matrices and AdamW on the rest, all weights, with a new head."""

    learning_rate: float = setting(1e-2, "Peak learning rate.", sweep=(1e-4, 1e-3, 1e-2, 1e-1))
    optimizer: str = setting("muon", "muon; anything else is TrainingArguments.optim.")


ATTACK = Attack(config=MuonFinetune, run=partial(run_finetunes, prepare=unfrozen), family="second-order fine-tuning")
