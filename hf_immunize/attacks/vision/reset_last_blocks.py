"""Throw the last blocks away and train the network from there: hidden traps in late layers go with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from hf_immunize.attacks.core.shape import Attack, Run, setting
from hf_immunize.attacks.vision._blocks import last_blocks
from hf_immunize.attacks.vision._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.errors import ModelError
from hf_immunize.models import random_classifier


@dataclass(frozen=True)
class ResetLastBlocks(FinetuneConfig):
    """AdamW on all weights after the last blocks, what follows them, and the head were drawn anew."""

    share: float = setting(0.34, "Share of the blocks that is drawn anew, at least one.")


def _prepare(context: AttackContext, planned: Run) -> nn.Module | str:
    model = context.model_with_new_head(planned.seed)
    fresh = random_classifier(context.folder, planned.seed).to(context.device)
    try:
        olds, news = (last_blocks(found, planned.config.share) for found in (model, fresh))
    except ModelError as error:
        return str(error)
    head = model.get_submodule(context.head)
    with torch.no_grad():
        for old, new in zip(olds, news, strict=True):
            if old is not head and head not in old.modules():
                old.load_state_dict(new.state_dict())
    model.requires_grad_(True)
    return model


ATTACK = Attack(config=ResetLastBlocks, run=partial(run_finetunes, prepare=_prepare), family="structural")
