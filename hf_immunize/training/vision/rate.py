"""The learning rate of a run that names none: a share of how large the trained weights are."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers.utils import logging

from hf_immunize.training.core.sharding import whole
from hf_immunize.training.vision.config import ImmunizationConfig

logger = logging.get_logger(__name__)

_SHARE = 0.02
_LEAST, _MOST = 1e-4, 3e-3
_WITHOUT = 3e-4
"""Where no matrix is trained, as where biases alone are."""


def rate_of(model: nn.Module) -> float:
    """Learning rate in proportion to the trained matrices, within 1e-4 to 3e-3.

    η = 0.02 · r, r = √(Σ w² / n) over the n entries of all trained weights of two and more dimensions.

    A step of AdamW moves every weight by about η however large it is, so that one rate changes a wide network (small
    weights) much and a narrow one (large weights) hardly at all. Biases and scales are left out: they start at 0 and 1
    whatever the width. On small networks of MNIST 3e-4 was too little for 40 steps of closed_form_adversary and 1e-2
    too much; on the tests' wider ViT 3e-3 was.
    """
    squares = entries = 0.0
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad and weight.dim() > 1:
                squares += float(torch.linalg.vector_norm(whole(weight.detach()), dtype=torch.float64)) ** 2
                entries += weight.numel()
    if not squares:
        return _WITHOUT
    return min(max(_SHARE * (squares / entries) ** 0.5, _LEAST), _MOST)


def with_rate(args: ImmunizationConfig, model: nn.Module) -> ImmunizationConfig:
    """The options themselves where they name a rate, else a copy with the model's: the next model gets its own."""
    if args.learning_rate is not None:
        return args
    args = copy.copy(args)
    args.learning_rate = rate_of(model)
    logger.info(f"learning_rate={args.learning_rate:.2g}, after the size of the trained weights.")
    return args
