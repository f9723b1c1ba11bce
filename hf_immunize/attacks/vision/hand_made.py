"""Features that need no training: histograms of gradient directions and of colours, for attackers without the model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

DIRECTIONS, LEVELS = 9, 8
_CELLS = (4, 8)
"""Cells per side of the two grids of direction histograms."""


def direction_histograms(pixels: Tensor) -> Tensor:
    """Histograms of oriented gradients (Dalal & Triggs 2005) of N×C×H×W images, one row per image.

    Directions without sign in nine bins, each gradient shared by the two nearest, weighted by its length; of the
    channels the one with the longest gradient counts. Averages over a coarse and a fine grid of cells, each cell
    divided by the root of the energy of its 3×3 neighbourhood, and cut at 0.2.
    """
    right = nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate")
    across, down = right[:, :, 1:-1, 2:] - right[:, :, 1:-1, :-2], right[:, :, 2:, 1:-1] - right[:, :, :-2, 1:-1]
    length, channel = (across.square() + down.square()).sqrt().max(dim=1, keepdim=True)
    angle = torch.atan2(down.gather(1, channel), across.gather(1, channel)).remainder(math.pi) / math.pi * DIRECTIONS
    low, share = angle.floor(), angle - angle.floor()
    votes = torch.zeros(len(pixels), DIRECTIONS, *pixels.shape[-2:])
    votes.scatter_add_(1, low.long() % DIRECTIONS, length * (1 - share))
    votes.scatter_add_(1, (low.long() + 1) % DIRECTIONS, length * share)
    parts = []
    for cells in _CELLS:
        height, width = (min(cells, side) for side in pixels.shape[-2:])
        grid = nn.functional.adaptive_avg_pool2d(votes, (height, width))
        energy = nn.functional.avg_pool2d(grid.square().sum(dim=1, keepdim=True), 3, 1, 1, count_include_pad=False)
        # tiny: an image of one colour has no direction, and stays zero
        parts.append((grid / energy.clamp(min=torch.finfo(grid.dtype).tiny).sqrt()).clamp(max=0.2).flatten(1))
    return torch.cat(parts, dim=1)


def colour_histograms(pixels: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Share of each channel's pixels in eight equal bins between ``lowest`` and ``highest``, one row per image.

    Args:
        lowest, highest: one value per channel.
    """
    span = (highest - lowest).clamp(min=torch.finfo(pixels.dtype).tiny)
    bins = ((pixels - lowest[:, None, None]) / span[:, None, None] * LEVELS).long().clamp(0, LEVELS - 1)
    return torch.cat([(bins == level).to(pixels).mean(dim=(2, 3)) for level in range(LEVELS)], dim=1)
