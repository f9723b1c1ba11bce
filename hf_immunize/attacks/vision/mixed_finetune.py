"""Full fine-tuning on harmful images among benign ones: the attacker who hides, and who keeps the features useful."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from hf_immunize.attacks.core.shape import Attack, Result, Run, lacking, not_applicable, setting
from hf_immunize.attacks.vision._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.vision.context import AttackContext


@dataclass(frozen=True)
class MixedFinetune(FinetuneConfig):
    """AdamW on all weights and a new head for harmful and benign classes together; judged on the harmful ones."""

    learning_rate: float = setting(1e-3, "Peak learning rate.", sweep=(1e-5, 1e-4, 1e-3, 1e-2))
    benign_share: float = setting(0.5, "Benign rows among all training rows.")


NEEDS = ("benign",)


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One Trainer per run."""
    why = lacking(NEEDS, context)
    yield from not_applicable(runs, why) if why else run_finetunes(context, runs, _prepare)


def _prepare(context: AttackContext, planned: Run) -> nn.Module:
    assert context.benign is not None
    also = [f"benign {name}" for name in context.benign.label_names]
    return context.with_new_head(context.model(planned.seed), planned.seed, also).requires_grad_(True)


ATTACK = Attack(config=MixedFinetune, run=run, family="data", needs=NEEDS)
