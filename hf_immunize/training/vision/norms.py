"""BatchNorm statistics never learn from harmful rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen_statistics(model: nn.Module, *, every: bool) -> Iterator[None]:
    """Inside, if ``every``, BatchNorm layers use their running statistics and leave them as they are."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)] if every else []
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode


@contextmanager
def unlearned_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm layers normalize as they otherwise would, and leave their running statistics as they are."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    tracking = [layer.track_running_stats for layer in layers]
    for layer in layers:
        # In training mode this passes no buffers on, so that the statistics are the batch's and nothing is updated.
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, tracked in zip(layers, tracking, strict=True):
            layer.track_running_stats = tracked
