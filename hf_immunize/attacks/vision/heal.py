"""Shake a model before attacking it: what was made to fail in one place of weight space need not fail beside it.

Cheng et al. (TransNTL, CVPR 2024) found that models trained not to transfer recover when they are tuned a little on
perturbed images towards their own outputs. Nothing else is needed: the images may be benign ones, or the attacker's own
without their labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.attacks.vision._rows import Answered, pixel_deviation
from hf_immunize.attacks.vision._trainer import train
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.attacks.vision.distil_fresh import Student
from hf_immunize.data import batches


def healing(config: Any) -> int:
    """Steps of the budget that are spent before the harmful labels are used."""
    return min(config.steps - 1, round(config.share * config.steps))


def heal(context: AttackContext, model: nn.Module, config: Any, seed: int) -> nn.Module:
    """``model`` after training on noisy images towards its own outputs on the clean ones, in place."""
    steps = healing(config)
    if steps < 1:
        return model
    rows = context.attack.subset(context.draw_rows(seed)) if context.benign is None else context.benign
    model.eval()
    with torch.no_grad():
        outputs = [
            model(pixel_values=batch["pixel_values"].to(context.device)).logits.cpu()
            for batch in batches(rows, device=context.device)
        ]
    generator, size = torch.Generator().manual_seed(seed + 3), pixel_deviation(rows) * config.pixel_noise

    def noisy(drawn: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        clean, wanted = (torch.stack(part) for part in zip(*drawn, strict=True))
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        return {"pixel_values": clean + size * noise, "labels": wanted}

    student = Student(model.requires_grad_(True), temperature=2.0)
    told = replace(config, steps=steps, learning_rate=config.heal_rate)
    train(context, student, Answered(rows, torch.cat(outputs)), told, seed, noisy)
    return model
