"""What the primary task is still worth."""

from __future__ import annotations

import torch
from torch import nn

from hf_immunize.data import PixelDataset, batches
from hf_immunize.errors import ModelError
from hf_immunize.features import prefer_channels_last
from hf_immunize.metrics import paired_drop_interval
from hf_immunize.records import Utility


@torch.no_grad()
def correct_rows(model: nn.Module, dataset: PixelDataset) -> list[bool]:
    """Which rows the model classifies correctly, in evaluation mode.

    Raises:
        ModelError: the model's classes are not those of the dataset.
    """
    outputs = model.config.num_labels
    if outputs != len(dataset.label_names):
        raise ModelError(
            f"expected a model with the {len(dataset.label_names)} classes of {dataset.name}, got {outputs}: check "
            "primary_labels, or certify a model that was trained on this primary task."
        )
    device, was_training = next(model.parameters()).device, model.training
    prefer_channels_last(model).eval()
    hits: list[bool] = []
    for batch in batches(dataset, device=device):
        predicted = model(pixel_values=batch["pixel_values"].to(device)).logits.argmax(dim=-1).cpu()
        hits += (predicted == batch["labels"]).tolist()
    model.train(was_training)
    return hits


def measure_utility(base: nn.Module, immunized: nn.Module, dataset: PixelDataset, level: float = 0.95) -> Utility:
    """Primary accuracy of both models on the same held-out rows, percent, with the paired interval of the drop."""
    before, after = correct_rows(base, dataset), correct_rows(immunized, dataset)
    return Utility(
        metric="accuracy",
        base=100 * sum(before) / len(before),
        immunized=100 * sum(after) / len(after),
        drop=paired_drop_interval(before, after, level),
        rows=len(before),
    )
