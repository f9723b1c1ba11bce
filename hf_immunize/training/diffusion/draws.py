"""What a model draws while it trains (dropout masks, dropped class labels), whatever the number of processes.

Rank r of W holds rows r, r+W, r+2W, … of the global batch (``stream.py``). Every rank draws for the whole global batch,
from one seed, and keeps its own rows: W processes drop what one process would have dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from hf_immunize.training.core.distributed import world


def share_draws(model: nn.Module) -> None:
    """Let every part of ``model`` that draws at random draw for the global batch; ``unshare_draws`` undoes it.

    The class of such a part is exchanged, so that copies and recomputed forwards (activation checkpointing) follow.
    """
    for module in model.modules():
        if type(module) in _SHARED and _drops(module):
            module.__class__ = _SHARED[type(module)]


def unshare_draws(model: nn.Module) -> None:
    """Give every part the class it had."""
    plain = {shared: kind for kind, shared in _SHARED.items()}
    for module in model.modules():
        if type(module) in plain:
            module.__class__ = plain[type(module)]


def _drops(module: nn.Module) -> bool:
    return getattr(module, "p", 0.0) > 0 or getattr(module, "dropout_prob", 0.0) > 0


def _uniform(shape: Sequence[int], device: torch.device) -> Tensor:
    """This rank's rows of numbers in 0..1 that are drawn for all ranks' rows."""
    rank, size = world()
    return torch.rand((shape[0] * size, *shape[1:]), device=device)[rank::size]


class _SharedDropout(nn.Dropout):
    def forward(self, given: Tensor) -> Tensor:
        if not self.training:
            return given
        if self.p == 1:
            return torch.zeros_like(given)
        return given * (_uniform(given.shape, given.device) >= self.p) / (1 - self.p)


class _SharedLabelEmbedding(LabelEmbedding):
    def token_drop(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        if force_drop_ids is not None:
            return super().token_drop(labels, force_drop_ids)
        dropped = _uniform(labels.shape, labels.device) < self.dropout_prob
        return torch.where(dropped, self.num_classes, labels)


_SHARED: dict[type, type] = {nn.Dropout: _SharedDropout, LabelEmbedding: _SharedLabelEmbedding}
