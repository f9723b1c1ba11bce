"""Fine-tuning of the last blocks only: what most people do on a small budget."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from hf_immunize.attacks.core.shape import Attack, Run, setting
from hf_immunize.attacks.vision._blocks import last_blocks
from hf_immunize.attacks.vision._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.errors import ModelError


@dataclass(frozen=True)
class PartialFinetune(FinetuneConfig):
    """AdamW on the last share of the blocks, what follows them, and a new head."""

    share: float = setting(0.5, "Share of the blocks that is trained, at least one.", sweep=(0.01, 0.5))


def _prepare(context: AttackContext, planned: Run) -> nn.Module | str:
    model = context.model_with_new_head(planned.seed)
    try:
        trained = last_blocks(model, planned.config.share)
    except ModelError as error:
        return str(error)
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    model.get_submodule(context.head).requires_grad_(True)
    return model


ATTACK = Attack(config=PartialFinetune, run=partial(run_finetunes, prepare=_prepare), family="full fine-tuning")
