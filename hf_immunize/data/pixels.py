"""Images to checked pixel tensors: one map-style dataset of ``{"pixel_values", "labels"}`` that both sides use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from hf_immunize.data.rows import read_image
from hf_immunize.errors import DataError


class PixelDataset(Dataset):
    """Preprocessed images in memory with integer labels.

    Args:
        pixel_values: N×C×H×W floating tensor.
        labels: N integers in 0..len(label_names)-1.
        label_names: one name per label.
        name: what to call this split in messages and fingerprints.

    Raises:
        DataError: no rows, NaN or infinite pixels (the first bad row is named), labels outside the range, or shapes
            that do not fit.
    """

    def __init__(self, pixel_values: Tensor, labels: Tensor, label_names: Sequence[str], name: str = "data"):
        if pixel_values.dim() != 4 or len(pixel_values) != len(labels):
            raise DataError(
                f"expected N x C x H x W pixels and N labels in {name}, got {tuple(pixel_values.shape)} and "
                f"{tuple(labels.shape)}: pass one label per image."
            )
        if len(labels) == 0:
            raise DataError(f"expected at least one row in {name}, got an empty dataset: check its split and filter.")
        bad = ~torch.isfinite(pixel_values).flatten(1).all(dim=1)
        if bool(bad.any()):
            raise DataError(
                f"expected finite pixels in {name}, got NaN or infinity in row {int(bad.nonzero()[0])}: remove it."
            )
        outside = (labels < 0) | (labels >= len(label_names))
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise DataError(
                f"expected labels in 0..{len(label_names) - 1} in {name}, got {int(labels[row])} in row {row}: fix the "
                "label column or the model's num_labels."
            )
        self.pixel_values, self.labels = pixel_values, labels.long()
        self.label_names, self.name = list(label_names), name

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}

    def subset(self, indices: Tensor, name: str | None = None) -> PixelDataset:
        """The rows at ``indices``, in that order."""
        return PixelDataset(self.pixel_values[indices], self.labels[indices], self.label_names, name or self.name)


def collate_pixels(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack rows of ``{"pixel_values", "labels"}`` (``label`` is accepted for ``labels``).

    Raises:
        DataError: a row without one of the two columns, images of different sizes, or NaN or infinite pixels.
    """
    label = "label" if "label" in rows[0] else "labels"
    for column in ("pixel_values", label):
        if column not in rows[0]:
            raise DataError(
                f"expected a '{column}' column, got {sorted(rows[0])}: preprocess images to 'pixel_values' and name "
                "the label column 'labels'."
            )
    images = [torch.as_tensor(row["pixel_values"]) for row in rows]
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise DataError(
            f"expected images of one size in a batch, got {sorted(shapes)}: let the image processor resize them."
        )
    pixels = torch.stack(images)
    if not bool(torch.isfinite(pixels).all()):
        place = int((~torch.isfinite(pixels)).flatten(1).any(dim=1).nonzero()[0])
        raise DataError(
            f"expected finite pixels, got NaN or infinity in image {place} of a batch: remove the image, or check the "
            "image processor's mean and standard deviation."
        )
    return {"pixel_values": pixels, "labels": torch.as_tensor([int(row[label]) for row in rows])}


def preprocess(
    dataset: Any,
    processor: Any,
    *,
    label_names: Sequence[str],
    name: str,
    image_column: str = "image",
    label_column: str = "label",
    batch_size: int = 256,
) -> PixelDataset:
    """Run an image processor over a ``datasets.Dataset`` once and keep the pixels in memory.

    Raises:
        DataError: empty dataset, missing column, or an image that cannot be decoded (row and file are named).
    """
    columns = dataset.column_names
    for option, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in columns:
            raise DataError(f"expected column '{column}' in {name}, got {columns}: set {option}.")
    if len(dataset) == 0:
        raise DataError(f"expected at least one row in {name}, got an empty dataset: check the split and the filter.")
    parts = []
    for start in tqdm(range(0, len(dataset), batch_size), desc=f"pixels of {name}", leave=False, disable=None):
        rows = range(start, min(start + batch_size, len(dataset)))
        images = [read_image(dataset, row, image_column, name) for row in rows]
        parts.append(processor(images, return_tensors="pt")["pixel_values"])
    return PixelDataset(torch.cat(parts), torch.as_tensor(dataset[label_column][:]), label_names, name)
