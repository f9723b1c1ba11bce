"""How rows become a batch: of a primary task of any kind, and of harmful rows under a collator for primary ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from hf_immunize.data import collate_pixels, label_key
from hf_immunize.training.vision.frozen import collate_with_boundary
from hf_immunize.training.vision.primary import SINGLE

logger = logging.get_logger(__name__)

_NUMBERS = (Tensor, np.ndarray, np.generic, int, float, list)
"""What a forward may take; an image that a transform left in its rows, or a file's name, it does not."""


def collate_with_labels(collate: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """``collate`` for a primary task whose labels are vectors or real numbers, or are not there."""
    if kind == SINGLE:
        return collate

    def collated(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        key = label_key(rows[0]) or "labels"
        images = collate([{"pixel_values": row["pixel_values"], "labels": 0} for row in rows])
        rest = {
            name: torch.stack([torch.as_tensor(row[name]) for row in rows])
            for name, value in rows[0].items()
            if name not in ("pixel_values", "labels", "label") and isinstance(value, _NUMBERS)
        }
        found = {"pixel_values": images["pixel_values"], **rest}
        if key not in rows[0]:
            return found
        labels = torch.stack([torch.as_tensor(row[key]) for row in rows])
        # Harmful rows share this collator, and their labels are classes.
        return found | {"labels": labels if labels.dtype == torch.long and labels.dim() == 1 else labels.float()}

    return collated


def collators_of(
    given: Callable[..., Any] | None, kind: str, dtype: torch.dtype
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The collator of primary training rows, and the one of all others, which never mixes images.

    Args:
        given: the user's; None for ours.
        kind: of the primary task.
        dtype: of the weights that read images.
    """
    ours = collate_with_labels(collate_pixels, kind)
    plain = UnmixedCollator(given, ours) if given else ours
    first, second = (collate_with_boundary(InPrecision(one, dtype)) for one in (given or ours, plain))
    return first, second


def where_labelled(collate: Callable[..., Any]) -> Callable[..., Any]:
    """``collate`` for images to predict, which may have no labels: their batches then have none either."""

    def collated(rows: Sequence[Any]) -> Any:
        if not isinstance(rows[0], Mapping) or label_key(rows[0]) is not None:
            return collate(rows)
        batch = collate([{**row, "labels": 0} for row in rows])
        return {name: value for name, value in batch.items() if name != "labels"}

    return collated


class InPrecision:
    """A collator whose pixels have the precision of the model's weights: NumPy's own default, float64, is another.

    Args:
        given: makes the batch.
        dtype: of the weights that read images.
    """

    def __init__(self, given: Callable[..., Any], dtype: torch.dtype):
        self._given, self._dtype = given, dtype

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Any:
        """One batch."""
        batch = self._given(rows)
        pixels = batch.get("pixel_values") if isinstance(batch, Mapping) else None
        if isinstance(pixels, Tensor) and pixels.is_floating_point() and pixels.dtype != self._dtype:
            return {**batch, "pixel_values": pixels.to(self._dtype)}
        return batch


class UnmixedCollator:
    """A user's own collator for harmful rows and evaluations, as long as it leaves labels alone.

    One that mixes images and labels (MixUp, CutMix) is for primary rows in training: terms and metrics compare classes,
    and a mixed row has none. Other rows are then stacked as they are, which is said once.
    """

    def __init__(self, given: Callable[..., Any], plain: Callable[..., Any]):
        self._given, self._plain, self._mixes = given, plain, False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One batch."""
        if not self._mixes:
            batch: dict[str, Any] = self._given(rows)
            if "labels" not in batch or _same_labels(batch["labels"], rows):
                return batch
            self._mixes = True
            logger.warning(
                "The data_collator changes labels, as MixUp does: harmful rows and evaluations do without it. "
                "Put what they need (resizing, normalization) into the datasets."
            )
        stacked: dict[str, Any] = self._plain(rows)
        return stacked


def _same_labels(labels: Any, rows: Sequence[dict[str, Any]]) -> bool:
    told = torch.as_tensor(labels)
    own = [torch.as_tensor(row["labels" if "labels" in row else "label"]) for row in rows]
    return told.dtype == torch.long and len(told) == len(own) and torch.equal(told.cpu(), torch.stack(own).long())
