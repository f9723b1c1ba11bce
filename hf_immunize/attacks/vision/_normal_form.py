"""The attacked model in its normal form: what only hides in its coordinates is gone before step 1."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_immunize.attacks.core.shape import Run
from hf_immunize.attacks.vision.canonical import Canonical, canonicalise
from hf_immunize.attacks.vision.context import AttackContext

_CHECKED_ON, _LOOKED_AT = 4, 64
"""Images on which the normal form is checked, and by which statistics and what excites a weight are told."""


def normal_form(context: AttackContext, seed: int) -> Canonical:
    """The attacked model in normal form, found once per model."""
    count = len(context.attack)
    spread = torch.linspace(0, count - 1, min(_LOOKED_AT, count)).round().long()  # rows may lie class by class
    images = context.attack.subset(spread).pixel_values
    few = images[torch.linspace(0, len(images) - 1, min(_CHECKED_ON, len(images))).round().long()]
    return context.once("normal form", seed, lambda: canonicalise(context.model(seed), context.head, few, images))


def canonical_model(context: AttackContext, seed: int) -> nn.Module | str:
    """A copy of the normal form with a new head, which trains without dropout; or words on why there is none."""
    found = normal_form(context, seed)
    if not found.changed:
        return found.note
    model = context.with_new_head(copy.deepcopy(found.model), seed)
    model.register_forward_pre_hook(_without_chance)
    return model


def _without_chance(model: nn.Module, inputs: Any) -> None:
    """No dropout while training, whatever the config says; batch norms still learn their statistics."""
    if model.training:
        for module in model.modules():
            module.training = isinstance(module, _BatchNorm)


def what_was_done(context: AttackContext, planned: Run) -> str:
    """What the normal form consists of, or why there is none; for the trace."""
    return normal_form(context, planned.seed).note
