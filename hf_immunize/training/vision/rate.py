"""The learning rate of a run that names none: as far as the answers hardly move."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_immunize.training.core.changing import ChangingPart
from hf_immunize.training.core.distributed import mean_over_ranks
from hf_immunize.training.vision.config import ImmunizationConfig

logger = logging.get_logger(__name__)

LEAST, MOST = 5e-5, 3e-3
_CHANGE = 0.6
"""Share of the answer to an image that a first step on it may change."""
_SMALL = 3e-6
_HELD, _HELD_FEATURES = 1.5, 5
"""How many times as much where the answers are held to those of θ₀ (``distillation``), which pulls them back, and where
features are as well. By probes after 40 steps: six ViTs on digits, held by answers, and MobileNetV2, by both."""
_WITHOUT = 3e-4
"""Where there are no logits to measure by."""


def rate_of(model: nn.Module, rows: Sequence[Mapping[str, Any]], times: float = 1) -> float:
    """The rate at which a first step of AdamW changes the answer to an image by 60 %, 5e-5 to 3e-3.

    That step is η·sign(g). With g the gradient of the log-probability of the image's own class, the change of logits z
    in units of η is

        r = lim ‖z(θ − ηs) − z(θ)‖ / (η·‖z(θ) − mean z(θ)‖),    s = sign g,    and η = 0.6 / r,

    with r the geometric mean over the images: of a small network that knows its digits it varies threefold between
    them. r depends on width and depth: 150 to 1,100 for networks of a few narrow layers, 3,400 to 7,700 for a
    MobileNetV2 of a quarter of the width on digits, 12,000 to 23,000 for one that knows ImageNet, so that η is 5e-5
    there and 1e-3 to 3e-3 for the small ones, which 5e-5 would not move. What one step changes on a batch is less, and
    later steps agree less.

    Args:
        model: as it is before training; weights that do not train stay where they are.
        rows: images, ``pixel_values`` of C×H×W; those whose logits are all equal say nothing.
        times: how many times as much may change.
    """
    changes = torch.tensor([change for row in rows if (change := _change(model, row)) is not None]).double()
    if not len(changes):
        return _WITHOUT
    rate = times * _CHANGE / float(changes.clamp_min(1e-12).log().mean().exp())
    return min(max(float(f"{rate:.2g}"), LEAST), MOST)


def _change(model: nn.Module, row: Mapping[str, Any]) -> float | None:
    """r of one image; None where there are no two logits, or they do not differ."""
    trained, training = ChangingPart(model).parameters, model.training
    kept = [parameter.detach().clone() for parameter in trained]
    images = torch.as_tensor(row["pixel_values"])[None].to(next(model.parameters()).device)

    def answer() -> Tensor:
        found: Tensor = getattr(model(pixel_values=images), "logits", images[:, :0])
        return found.flatten()

    model.eval()
    try:
        with torch.enable_grad():
            start = answer()
            if len(start) < 2 or not start.requires_grad:
                return None
            slopes = torch.autograd.grad(start.log_softmax(0).max(), trained, materialize_grads=True, allow_unused=True)
        with torch.no_grad():
            for parameter, value, slope in zip(trained, kept, slopes, strict=True):
                parameter.copy_(value - _SMALL * slope.sign())
            change = (answer() - start).double().norm() / (start - start.mean()).double().norm() / _SMALL
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
        model.train(training)
    return float(change) if bool(torch.isfinite(change)) else None


def with_rate(args: ImmunizationConfig, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> ImmunizationConfig:
    """The options themselves where they name a rate, else a copy with the model's: the next model gets its own."""
    if args.learning_rate is not None:
        return args
    args = copy.copy(args)
    times = _HELD_FEATURES if args.feature_distillation else _HELD if args.distillation else 1
    rate = torch.tensor(rate_of(model, rows, times), dtype=torch.float64, device=args.device)
    args.learning_rate = float(f"{float(mean_over_ranks(rate)):.2g}")  # processors round differently
    logger.info(f"learning_rate={args.learning_rate:.2g}, after how far a first step of it moves the answer.")
    return args
