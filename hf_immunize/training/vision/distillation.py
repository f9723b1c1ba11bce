"""How far features have moved from those of θ₀, row by row."""

from __future__ import annotations

import torch
from torch import Tensor


def feature_distance(features_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean over rows of ‖φ − φ₀‖² / ‖φ₀‖²: 0 where nothing moved, about 1 where φ says nothing of φ₀.

    After FitNets (Romero et al. 2015), relative so that a weight means the same at any width and scale of the
    features. A row's share depends on that row alone, so means over ranks and micro-batches are means over rows. A row
    whose φ₀ is zero counts with its own φ relative to the smallest normal number, i.e. it is held at zero.
    """
    moved = (features_ND - teacher_ND).square().sum(dim=1)
    size = teacher_ND.square().sum(dim=1).clamp(min=torch.finfo(teacher_ND.dtype).tiny)
    return (moved / size).mean()
