"""Normalisation layers as if new."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_immunize.attacks.vision.batchnorm_probe import reestimate
from hf_immunize.attacks.vision.context import AttackContext


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer, group or batch norm with gains; architectures' own ones are subclasses."""
    known = isinstance(module, nn.LayerNorm | nn.GroupNorm | _BatchNorm)
    return known and isinstance(getattr(module, "weight", None), Tensor)


@torch.no_grad()
def reset_norms(model: nn.Module, context: AttackContext, seed: int) -> nn.Module:
    """Gain 1 and shift 0 for every norm, then statistics of the seed's own rows for batch norms; in place."""
    norms: list[Any] = [module for module in model.modules() if is_norm(module)]
    for norm in norms:
        norm.weight.fill_(1)
        if isinstance(norm.bias, Tensor):
            norm.bias.zero_()
    batch_norms = any(isinstance(module, _BatchNorm) for module in model.modules())
    return reestimate(model, context, seed) if batch_norms else model
