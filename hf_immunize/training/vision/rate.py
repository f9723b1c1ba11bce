"""The learning rate of a run that names none: as far as the answers hardly move."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_immunize.training.core.changing import ChangingPart
from hf_immunize.training.core.distributed import mean_over_ranks
from hf_immunize.training.vision.config import ImmunizationConfig

logger = logging.get_logger(__name__)

LEAST, MOST = 3e-4, 3e-3
_CHANGE = 0.02
"""Share of the answer that a random step of the rate may change."""
_DRAWS = 8


@torch.no_grad()
def rate_of(model: nn.Module, row: Mapping[str, Any]) -> float:
    """The largest rate at which a random step changes the answer by 2 %, within 3e-4 to 3e-3; two digits.

    AdamW moves each weight by about the rate η however large it is. What that does to a model depends on its width and
    depth alone: with s of random signs, the change of logits z,

        r(η) = E_s ‖z(θ + ηs) − z(θ)‖ / ‖z(θ) − mean z(θ)‖,

    is 0.04 at η = 3e-4 for a MobileNetV2 of 52 layers and 0.002 to 0.007 for networks of a few narrow layers, and grows
    in proportion to η. Deep networks keep 3e-4; narrow ones, whose features such steps hardly move, get more. The size
    of the weights does not tell: at 0.02 of it that MobileNetV2 forgot its classes.

    Args:
        model: as it is before training; weights that do not train stay where they are.
        row: one image, ``pixel_values`` of C×H×W.
    """
    images = torch.as_tensor(row["pixel_values"])[None].to(next(model.parameters()).device)
    trained, training = ChangingPart(model), model.training
    kept = [parameter.detach().clone() for parameter in trained.parameters]
    signs = torch.Generator().manual_seed(0)

    def answer() -> Tensor:
        found = getattr(model(pixel_values=images), "logits", images[:, :0])
        return found.double().flatten()

    model.eval()
    try:
        start, changes = answer(), []
        for _ in range(_DRAWS):
            for parameter, value in zip(trained.parameters, kept, strict=True):
                drawn = torch.randint(2, value.shape, generator=signs, dtype=torch.int8).to(value.device)
                parameter.copy_(value + LEAST * (2 * drawn - 1))
            changes.append((answer() - start).norm())
    finally:
        for parameter, value in zip(trained.parameters, kept, strict=True):
            parameter.copy_(value)
        model.train(training)
    change = torch.stack(changes).mean() / (start - start.mean()).norm()
    if not bool(torch.isfinite(change)):  # a single output, or none that are called logits: nothing to measure by
        return LEAST
    return min(max(float(f"{LEAST * _CHANGE / max(float(change), 1e-12):.2g}"), LEAST), MOST)


def with_rate(args: ImmunizationConfig, model: nn.Module, row: Mapping[str, Any]) -> ImmunizationConfig:
    """The options themselves where they name a rate, else a copy with the model's: the next model gets its own."""
    if args.learning_rate is not None:
        return args
    args = copy.copy(args)
    rate = torch.tensor(rate_of(model, row), dtype=torch.float64, device=args.device)
    args.learning_rate = float(f"{float(mean_over_ranks(rate)):.2g}")  # processors round differently
    logger.info(f"learning_rate={args.learning_rate:.2g}: a random step of it moves the answer by about 2 % or 3e-4.")
    return args
