"""What an attack costs, estimated: floating-point operations, a multiply and an add counted as two."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

BACKWARD = 3.0
"""Forward and backward over forward: two products of the forward's size in the backward pass of every trained layer.
Adapters skip the weights' product of frozen layers, so for them this is an upper estimate."""


@torch.no_grad()
def forward_flops(model: nn.Module, image_shape: torch.Size) -> float | None:
    """Operations of one image's forward, counted on the model itself; None where the counter does not know a layer."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with FlopCounterMode(display=False) as counter:
            model(pixel_values=torch.zeros(1, *image_shape, device=device))
    except (RuntimeError, NotImplementedError):
        return None
    finally:
        model.train(was_training)
    return float(counter.get_total_flops())


def trained_samples(rows: int, batch_size: int, steps: int) -> int:
    """Rows seen in ``steps`` batches when the last batch of an epoch is what is left of it."""
    return round(steps * rows / math.ceil(rows / batch_size))


def probe_flops(rows: int, width: int, classes: int, passes: int) -> float:
    """Logits and gradient of a linear probe: two N×D×C products a pass."""
    return 4.0 * rows * width * classes * passes


def ridge_flops(rows: int, width: int, classes: int) -> float:
    """Gram matrix of the smaller side, its Cholesky factor, and the right-hand sides."""
    side, other = sorted((rows, width))
    return 2.0 * side * side * other + side**3 / 3 + 4.0 * rows * width * classes
