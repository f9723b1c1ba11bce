"""Full fine-tuning with Muon: an orthogonalised, hence preconditioned, update of every weight matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hf_immunize.attacks._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.context import AttackContext
from hf_immunize.attacks.full_finetune import unfrozen
from hf_immunize.attacks.shape import Attack, Result, Run


@dataclass(frozen=True)
class MuonFinetune(FinetuneConfig):
    """``torch.optim.Muon`` on matrices and AdamW on the rest, all weights, with a new head."""

    learning_rate: float = field(
        default=1e-2, metadata={"help": "Peak learning rate.", "sweep": (1e-4, 1e-3, 1e-2, 1e-1)}
    )
    optimizer: str = field(default="muon", metadata={"help": "muon; anything else is TrainingArguments.optim."})


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One Trainer per run."""
    yield from run_finetunes(context, runs, unfrozen)


ATTACK = Attack(config=MuonFinetune, run=run, family="second-order fine-tuning")
