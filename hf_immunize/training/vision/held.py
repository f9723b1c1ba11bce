"""What a classifier that knows its task is given where nothing was said: it is held to its answers, and of a large one
the last stage alone is trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers.utils import logging

from hf_immunize.data import NamedRows, is_stream, label_key
from hf_immunize.errors import ModelError
from hf_immunize.features import find_stages
from hf_immunize.training.vision.config import ON_FEATURES, ImmunizationConfig
from hf_immunize.training.vision.primary import SINGLE

logger = logging.get_logger(__name__)

LARGE = 1_000_000
"""Parameters from which on the last stage alone is trained, as in the recipes. ``hf-immunize init`` drafts by it."""
HELD, HELD_FEATURES, PART = 10.0, 6.0, "last:1"
PROBED = "closed_form_adversary"
"""The objective with which small networks are held too."""
_STRENGTH, _STRENGTH_HELD = 0.5, 5.0
"""What is held is pulled ten times as hard. What being held saves at such a strength: docs/frontier.md, rows
``closed_form_adversary`` and ``adversary_not_held``."""
_LOOKS = 8


def is_large(model: nn.Module) -> bool:
    """Whether what suits networks of a few layers does not suit this one."""
    return sum(parameter.numel() for parameter in model.parameters()) >= LARGE


def part_of(args: ImmunizationConfig, model: nn.Module) -> str | None:
    """The last stage, where the user froze nothing, named no part and measures at the head; else what was named."""
    free = args.trainable_modules is None and args.sites == "head" and ON_FEATURES.issuperset(args.objectives)
    if not free or not is_large(model) or not all(parameter.requires_grad for parameter in model.parameters()):
        return args.trainable_modules
    try:
        return PART if len(find_stages(model)) > 1 else None
    except ModelError:
        return None


@torch.no_grad()
def knows_its_task(model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these images cost the classifier less than half of what it costs to guess, log C a row.

    Rows that training will refuse, by another shape or a label that is none, say nothing here: it names them.
    """
    was_training, losses = model.training, []
    weight = next(model.parameters())
    model.eval()
    try:
        for row in rows:
            images, label = torch.as_tensor(row["pixel_values"])[None], row.get(label_key(row) or "labels")
            if images.shape[1:] != torch.as_tensor(rows[0]["pixel_values"]).shape:
                return False
            logits = getattr(model(pixel_values=images.to(weight.device, weight.dtype)), "logits", images[:, :0])
            logits = logits.flatten().double()
            if len(logits) < 2 or not is_label(label, len(logits)):
                return False
            losses.append(float(-logits.log_softmax(0)[int(label)]) / math.log(len(logits)))
    finally:
        model.train(was_training)
    return sum(losses) < len(losses) / 2


def is_label(value: Any, classes: int) -> TypeGuard[Any]:
    """Whether it is one whole number of a class."""
    try:
        return int(value) == value and 0 <= int(value) < classes
    except (TypeError, ValueError, RuntimeError):
        return False


def with_held(
    args: ImmunizationConfig, model: nn.Module, kind: str, rows: Sequence[Mapping[str, Any]]
) -> ImmunizationConfig:
    """The options, with a number for ``strength`` and what holds the model, and a part to train, where these are open.

    Labels that a network has learned hold nothing any more: what it loses on other images does not come back while the
    guard waits. On MobileNetV2 with ImageNet weights, 12 classes of 20 cars harmful, 40 steps, one point allowed
    (docs/training.md): trained as a whole on labels, the probe keeps nine tenths of its gain; held to its answers with
    its last stage trained, just over half. A network whose head is new learns from labels, so does a small one whose
    features are only conditioned: held, opt_kappa did not slow gradient descent on digits in 40 steps.

    Args:
        kind: of the primary task.
        rows: a few of it, as ``some_rows`` finds them.
    """
    args = copy.copy(args)
    probed = PROBED in args.objectives
    held = ON_FEATURES.issuperset(args.objectives) and kind == SINGLE and (probed or is_large(model))
    held = held and knows_its_task(model, rows)
    large = held and is_large(model)
    args.trainable_modules = part_of(args, model) if large else args.trainable_modules
    for name, value in (("distillation", HELD if held else 0.0), ("feature_distillation", HELD_FEATURES * large)):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.strength is None:
        tenfold = held and args.distillation >= HELD and args.weight == "auto"
        args.strength = _STRENGTH_HELD if tenfold else _STRENGTH
    if held:
        logger.warning(
            f"A classifier that knows its task: strength={args.strength:g}, distillation={args.distillation:g}, "
            f"feature_distillation={args.feature_distillation:g}, trainable_modules={args.trainable_modules}."
        )
    return args


def some_rows(seen: Sequence[Mapping[str, Any]], primary: Any) -> list[Mapping[str, Any]]:
    """The few rows that were read, the first one before others; where it is alone, eight spread over the dataset.

    Classes may lie one after the other. Of a stream no others are there.
    """
    if len(seen) > 1:
        return list(seen[1:])  # row 0 may be in both
    if is_stream(primary) or len(primary) < 2:
        return list(seen)
    rows = NamedRows(primary, "train_dataset")
    places = torch.linspace(0, len(rows) - 1, min(_LOOKS, len(rows))).round().long().tolist()
    return [seen[0], *(rows[place] for place in dict.fromkeys(places[1:]))]
