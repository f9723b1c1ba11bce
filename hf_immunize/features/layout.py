"""How a convolutional network lies in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def prefer_channels_last(model: nn.Module) -> nn.Module:
    """``model``, its convolution weights channels last where it has batch normalisation; values stay as they are.

    Takes up to a third off a MobileNetV2's forward on a CPU (benchmarks/forward_batches.py); CUDA's convolutions prefer
    it too.
    """
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        _lay(model, torch.channels_last)
    return model


@contextmanager
def lying_channels_last(model: nn.Module) -> Iterator[nn.Module]:
    """The same inside the context; afterwards a network that was changed lies contiguous again."""
    preferred = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    try:
        yield prefer_channels_last(model)
    finally:
        if preferred:
            _lay(model, torch.contiguous_format)


def _lay(model: nn.Module, memory_format: torch.memory_format) -> None:
    model.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's overloads leave it out
