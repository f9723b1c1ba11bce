"""How far a model has moved from θ₀ on primary rows: the units in which outputs and features are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from hf_immunize.data import NamedStream, is_stream
from hf_immunize.training.vision.primary import MULTI, REGRESSION, SINGLE

SPREAD = 1.0
"""Root mean square that θ₀'s logits have once they are divided by the temperature."""
ROWS = 1024
"""Primary rows that the temperature is measured on."""


def feature_distance(features_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean over rows of ‖φ − φ₀‖² / ‖φ₀‖²: 0 where nothing moved, about 1 where φ says nothing of φ₀.

    After FitNets (Romero et al. 2015), relative so that a weight means the same at any width and scale of the
    features. A row's share depends on that row alone, so means over ranks and micro-batches are means over rows. A row
    whose φ₀ is zero counts with its own φ relative to the smallest normal number, i.e. it is held at zero.
    """
    moved = (features_ND - teacher_ND).square().sum(dim=1)
    size = teacher_ND.square().sum(dim=1).clamp(min=torch.finfo(teacher_ND.dtype).tiny)
    return (moved / size).mean()


def temperature_of(outputs_NC: Tensor, labels_N: Tensor, kind: str) -> float:
    """What θ₀'s outputs are divided by, so that a weight of ``distillation`` means the same for every head.

    KL(softmax(z₀/T) ‖ softmax(z/T)) with T = s(z₀)/SPREAD, s the root mean square of logits that are centred row by
    row. A head that is c times as large has c times the T, hence the same value and the same gradient at the features;
    with T = 1 (Hinton et al. 2015 leave T to the user) it would pull about c² times as hard. Independent bits: s is the
    root mean square of the logits. Regression: T is the outputs' standard deviation over rows, so that the squared
    error is a share of their variance.

    A classifier that is right no more often than its commonest label is has nothing to hold, and no scale to take: 1.
    """
    outputs = outputs_NC.detach().double()
    if kind == REGRESSION:
        spread = _root_mean_square(outputs - outputs.mean(dim=0))
    else:
        spread = _root_mean_square(outputs if kind == MULTI else outputs - outputs.mean(dim=1, keepdim=True))
        spread = spread / SPREAD
    silent = kind == SINGLE and not _beats_the_commonest_label(outputs, labels_N)
    return 1.0 if silent or not spread > 0 or not math.isfinite(spread) else spread


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _beats_the_commonest_label(outputs_NC: Tensor, labels_N: Tensor) -> bool:
    """Whether accuracy is above the commonest label's share by two standard errors."""
    labels = labels_N.long().to(outputs_NC.device)
    accuracy = float((outputs_NC.argmax(dim=1) == labels).double().mean())
    chance = float(labels.bincount().max()) / len(labels)
    return accuracy > chance + 2 * math.sqrt(chance * (1 - chance) / len(labels))


def evenly(rows: Any, most: int) -> Any:
    """At most ``most`` rows at equal distances, or the first ones of rows that have no places."""
    if is_stream(rows):
        return NamedStream(rows, "train_dataset", limit=most)
    count = min(most, len(rows))
    return Subset(rows, [place * len(rows) // count for place in range(count)])


class Temperature:
    """The temperature of one run: measured once on θ₀, before training, and kept in checkpoints."""

    def __init__(self) -> None:
        self.value: float | None = None

    def measure(self, outputs_NC: Tensor, labels_N: Tensor, kind: str) -> None:
        """Take θ₀'s outputs on primary rows."""
        self.value = temperature_of(outputs_NC, labels_N, kind)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs."""
        return {} if self.value is None else {"value": torch.tensor([self.value], dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        self.value = float(state["value"])
