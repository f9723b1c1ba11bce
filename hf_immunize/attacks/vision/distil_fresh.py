"""Distil the model into a fresh copy of its architecture, whose weights no defender has touched, and fine-tune that.

What it is worth: the student learns what the teacher's outputs on the attacker's few images tell, not the pre-training
behind it, and pays for it with steps that count. It beats training from scratch only as far as outputs carry over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from hf_immunize.attacks.core.shape import Attack, Run, setting
from hf_immunize.attacks.vision._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.vision._rows import Answered, training_rows
from hf_immunize.attacks.vision._trainer import train
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.data import batches
from hf_immunize.models import random_classifier


@dataclass(frozen=True)
class DistilFresh(FinetuneConfig):
    """AdamW on random weights: first the cross-entropy to the teacher's softened outputs, then the harmful labels."""

    share: float = setting(0.5, "Share of the steps that is spent on distillation.")
    temperature: float = setting(2.0, "Softening of both outputs while distilling.")


class Student(nn.Module):
    """A classifier whose loss is the cross-entropy to given logits; only Trainer sees it."""

    def __init__(self, model: nn.Module, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, pixel_values: Tensor, labels: Tensor) -> ImageClassifierOutput:
        """``labels`` are the teacher's logits."""
        logits = self.model(pixel_values=pixel_values).logits / self.temperature
        wanted = (labels / self.temperature).softmax(dim=-1)
        loss = nn.functional.cross_entropy(logits, wanted) * self.temperature**2
        return ImageClassifierOutput(loss=loss, logits=logits)


def _distilling(config: DistilFresh) -> int:
    return min(config.steps - 1, round(config.share * config.steps))


def _prepare(context: AttackContext, planned: Run) -> nn.Module:
    student = distil(context, planned.config, planned.seed)
    return context.with_new_head(student, planned.seed).requires_grad_(True)


def distil(context: AttackContext, config: DistilFresh, seed: int) -> nn.Module:
    """A fresh copy of the architecture, trained towards the model's outputs on this seed's rows."""
    student = random_classifier(context.folder, seed, as_usual=True).to(context.device)
    steps = _distilling(config)
    if steps > 0:
        rows = training_rows(context, config, seed)
        teacher = context.model(seed).eval()
        with torch.no_grad():
            parts = [
                teacher(pixel_values=batch["pixel_values"].to(context.device)).logits
                for batch in batches(rows, device=context.device)
            ]
        data = Answered(rows, torch.cat(parts).cpu())
        train(context, Student(student, config.temperature), data, replace(config, steps=steps), seed, _stack)
    return student


def _stack(rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    pixels, logits = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(pixels), "labels": torch.stack(logits)}


ATTACK = Attack(
    config=DistilFresh, run=partial(run_finetunes, prepare=_prepare, spent=_distilling), family="structural",
    covers="whatever sits in the weights and not in the outputs",
)
