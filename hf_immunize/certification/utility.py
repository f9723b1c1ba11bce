"""What the primary task is still worth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_immunize.data import PixelDataset, batches, for_model, refuse_other_labels
from hf_immunize.features import prefer_channels_last
from hf_immunize.metrics import paired_drop_interval
from hf_immunize.records import Utility


@torch.no_grad()
def predicted_labels(model: nn.Module, dataset: PixelDataset) -> Tensor:
    """The label id of the largest logit of every row, in evaluation mode, on the CPU."""
    device, was_training = next(model.parameters()).device, model.training
    prefer_channels_last(model).eval()
    found = [
        model(pixel_values=batch["pixel_values"].to(device)).logits.argmax(dim=-1).cpu()
        for batch in batches(dataset, device=device)
    ]
    model.train(was_training)
    return torch.cat(found)


def correct_rows(model: nn.Module, dataset: PixelDataset, *, is_base: bool = False) -> list[bool]:
    """Which rows the model classifies correctly, in evaluation mode, its classes and the dataset's matched by name.

    Raises:
        ModelError: the model's classes are not those of the dataset.
        DataError: ``is_base``, and the model tells the classes apart but calls them by other labels.
    """
    own = for_model(dataset, model.config.id2label)
    predicted = predicted_labels(model, own)
    if is_base:
        refuse_other_labels(predicted, own.labels, own.label_names, dataset.name)
    return (predicted == own.labels).tolist()


def measure_utility(base: nn.Module, immunized: nn.Module, dataset: PixelDataset, level: float = 0.95) -> Utility:
    """Primary accuracy of both models on the same held-out rows, percent, with the paired interval of the drop.

    Raises:
        ModelError, DataError: as in ``correct_rows``.
    """
    before, after = correct_rows(base, dataset, is_base=True), correct_rows(immunized, dataset)
    return Utility(
        metric="accuracy",
        base=100 * sum(before) / len(before),
        immunized=100 * sum(after) / len(after),
        drop=paired_drop_interval(before, after, level),
        rows=len(before),
    )
