"""What is measured on the model before training: how hard the primary task pulls back, how large its logits are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.features import Captured, capture_inputs
from hf_immunize.training.core.references import ReferenceGradients
from hf_immunize.training.core.sharding import settle
from hf_immunize.training.core.step import Step
from hf_immunize.training.vision.distillation import Temperature
from hf_immunize.training.vision.forwards import Forwards
from hf_immunize.training.vision.primary import UNLABELLED, wrong_labels

_STEPS = 8
"""Steps whose wrong-label gradients G is the mean of."""


def measure_references(
    step: Step, forwards: Forwards, bare: nn.Module, batches: Iterable[dict[str, Any]], loss_of: Any = None
) -> None:
    """G wherever a balance needs it and has none yet: the primary loss's pull with every label wrong.

    A task without labels cannot be wrong; there the gradient of its loss as it is has to do.

    Args:
        batches: primary micro-batches on the device; nothing is read where no balance waits.
        loss_of: ``compute_loss_func`` of Trainer.
    """
    waiting = {site: weights for site, weights in step.weights.items() if weights.needs_reference}
    if not waiting:
        return
    cut = forwards.args.gradient_accumulation_steps
    sites, steps = [site for site in waiting if site], []
    trained = [part for part in settle(bare).parameters() if part.requires_grad and "" in waiting]
    bare.eval()
    for place, inputs in enumerate(itertools.islice(batches, _STEPS * cut)):
        if place % cut == 0:
            steps.append(ReferenceGradients(sites, trained))
        steps[-1].add(*_wrong_loss(forwards, bare, inputs, sites, loss_of))
    for site, weights in waiting.items():
        found = [taken.at_sites()[site] if site else taken.at_weights() for taken in steps]
        weights.reference = torch.stack(found).mean()


def _wrong_loss(
    forwards: Forwards, bare: Any, inputs: dict[str, Any], sites: Sequence[str], loss_of: Any
) -> tuple[Tensor, Captured]:
    if forwards.kind != UNLABELLED:
        inputs = {**inputs, "labels": wrong_labels(inputs["labels"], forwards.kind, bare.config.num_labels)}
    with capture_inputs(bare, forwards.laid_out(sites)) as caught, forwards.entered(bare, inputs) as plain:
        with torch.enable_grad(), forwards.context():
            if loss_of is None:
                return bare(**plain).loss, caught
            labels = plain["labels"]
            return loss_of(bare(**{name: part for name, part in plain.items() if name != "labels"}), labels), caught


@torch.no_grad()
def measure_temperature(
    temperature: Temperature, forwards: Forwards, bare: Any, batches: Iterable[dict[str, Any]]
) -> None:
    """The temperature of distillation, from θ₀'s outputs on rows that no rank or batch decides."""
    bare.eval()
    outputs, labels = [], []
    for batch in batches:
        with forwards.context():
            outputs.append(forwards.features(bare, bare, batch)["logits"].double().cpu())
        labels.append(batch["labels"].cpu())
    temperature.measure(torch.cat(outputs), torch.cat(labels), forwards.kind)
