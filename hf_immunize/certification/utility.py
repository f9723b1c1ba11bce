"""What the primary task is still worth: answers of base and immunized classifier on the same held-out rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.certification.primary_rows import ACCURACY, judge_utility
from hf_immunize.data import PixelDataset, batches, for_model, id2label_of, refuse_other_labels
from hf_immunize.features import prefer_channels_last
from hf_immunize.records import Answers, ModelFingerprint, Utility, UtilityRows

_FOREIGN = -1


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


def answered(model: nn.Module, dataset: PixelDataset, *, is_base: bool = False) -> list[int]:
    """The dataset's number of the class that a model answers for every row, in evaluation mode; −1 for a class that
    the dataset does not have. Classes of both are matched by name.

    Raises:
        ModelError: the model's classes are not those of the dataset.
        DataError: ``is_base``, and the model tells the classes apart but calls them by other labels.
    """
    config: Any = model.config
    own = for_model(dataset, id2label_of(config))
    predicted = predicted_labels(model, own)
    if is_base:
        refuse_other_labels(predicted, own.labels, own.label_names, dataset.name)
    numbers = dict(zip(own.labels.tolist(), dataset.labels.tolist(), strict=True))
    return [numbers.get(answer, _FOREIGN) for answer in predicted.tolist()]


def correct_rows(model: nn.Module, dataset: PixelDataset, *, is_base: bool = False) -> list[bool]:
    """Which rows the model classifies correctly. Raises as ``answered``."""
    given = answered(model, dataset, is_base=is_base)
    return [answer == wanted for answer, wanted in zip(given, dataset.labels.tolist(), strict=True)]


def utility_rows(
    base: nn.Module, immunized: nn.Module, dataset: PixelDataset, data: str, subject: ModelFingerprint,
    control: ModelFingerprint,
) -> UtilityRows:
    """What both models answer on every row.

    Args:
        data: SHA-256 of the rows.
        subject, control: fingerprints of the immunized model and of the base.

    Raises:
        ModelError, DataError: as in ``answered``.
    """
    return UtilityRows(
        metric=ACCURACY, data=data, subject=subject.weights, control=control.weights,
        answers=Answers(
            wanted=dataset.labels.tolist(), base=answered(base, dataset, is_base=True),
            immunized=answered(immunized, dataset),
        ),
    )


def measure_utility(base: nn.Module, immunized: nn.Module, dataset: PixelDataset, level: float = 0.95) -> Utility:
    """Primary accuracy of both models on the same held-out rows, percent, with the paired interval of the drop.

    Raises:
        ModelError, DataError: as in ``answered``.
    """
    nobody = ModelFingerprint(name="", architecture="", parameters=0, weights={})
    rows = utility_rows(base, immunized, dataset, "", nobody, nobody)
    return judge_utility(rows, level)
