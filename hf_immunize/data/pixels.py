"""Images to checked pixel tensors: one map-style dataset of ``{"pixel_values", "labels"}`` that both sides use."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from hf_immunize.data.caching import described_processor, identity_of, places
from hf_immunize.data.images import BACKGROUND
from hf_immunize.data.levels import ImageTally
from hf_immunize.data.processors import PixelMaker
from hf_immunize.data.rows import columns_of, label_key, place_of, read_image, values_of
from hf_immunize.errors import DataError

KEPT_BYTES = 2**26
"""Splits whose pixels take no more are decoded once and kept; rows of larger ones are decoded when they are read."""
_BLOCK = 256
"""Images that are decoded together."""


class PixelDataset(Dataset[dict[str, Tensor]]):
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
        _check_labels(labels, label_names, name, pixels=pixel_values)
        self.pixel_values, self.labels = pixel_values, labels.long()
        self.label_names, self.name = list(label_names), name

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}

    @property
    def image_shape(self) -> torch.Size:
        """C×H×W of every image."""
        return self.pixel_values.shape[1:]

    def stacked(self, rows: Tensor) -> Tensor:
        """Pixels of some rows, N×C×H×W, in that order."""
        return self.pixel_values[rows]

    def blocks(self, size: int = _BLOCK) -> Iterator[Tensor]:
        """Pixels of all rows in order, some at a time."""
        for rows in torch.arange(len(self)).split(size):
            yield self.stacked(rows)

    def subset(self, indices: Tensor, name: str | None = None) -> PixelDataset:
        """The rows at ``indices``, in that order."""
        return PixelDataset(self.pixel_values[indices], self.labels[indices], self.label_names, name or self.name)

    def relabelled(self, labels: Tensor, label_names: Sequence[str]) -> PixelDataset:
        """The same images under other labels."""
        return PixelDataset(self.pixel_values, labels, label_names, self.name)

    def loaded(self) -> PixelDataset:
        """The same rows with their pixels in memory."""
        return self


def _check_labels(labels: Tensor, label_names: Sequence[str], name: str, pixels: Tensor | None = None) -> None:
    if len(labels) == 0:
        raise DataError(f"expected at least one row in {name}, got an empty dataset: check its split and filter.")
    if pixels is not None:
        bad = ~torch.isfinite(pixels).flatten(1).all(dim=1)
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


class ImagePixels(PixelDataset):
    """Images that are decoded and preprocessed each time they are read, by whoever reads them: a data worker, say.

    Args:
        read: gives pixels, N×C×H×W, of some rows of the source.
        rows: which rows of the source these are.
        labels, label_names, name: as in PixelDataset.
        identity: what these pixels are, for what is kept of a pass over them; None where that cannot be known.
    """

    def __init__(
        self, read: Callable[[Sequence[int]], Tensor], rows: Tensor, labels: Tensor, label_names: Sequence[str],
        name: str = "data", identity: str | None = None,
    ):  # fmt: skip
        _check_labels(labels, label_names, name)
        self._read, self._rows, self._identity = read, rows, identity
        self.labels, self.label_names, self.name = labels.long(), list(label_names), name

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Several rows, whose images go through the processor together."""
        pixels = self.stacked(torch.as_tensor(indices))
        return [{"pixel_values": one, "labels": self.labels[row]} for one, row in zip(pixels, indices, strict=True)]

    @property
    def identity(self) -> str | None:
        """A key of all pixels in their order."""
        if self._identity is None:
            return None
        return hashlib.sha256(f"{self._identity} {self._rows.tolist()}".encode()).hexdigest()[:32]

    @property
    def image_shape(self) -> torch.Size:
        """C×H×W of every image."""
        return self._read(self._rows[:1].tolist()).shape[1:]

    @property
    def pixel_values(self) -> Tensor:  # type: ignore[override]  # held by the others, made here
        """Pixels of all rows, decoded now and not kept: for as many as fit into memory."""
        blocks = tqdm(self.blocks(), desc=f"pixels of {self.name}", total=-(-len(self) // _BLOCK), leave=False,
                      disable=None)  # fmt: skip
        return torch.cat(list(blocks))

    def stacked(self, rows: Tensor) -> Tensor:
        """Pixels of some rows, N×C×H×W, in that order."""
        return self._read(self._rows[rows].tolist())

    def subset(self, indices: Tensor, name: str | None = None) -> PixelDataset:
        """The rows at ``indices``, in that order."""
        labels = self.labels[indices]
        return ImagePixels(self._read, self._rows[indices], labels, self.label_names, name or self.name, self._identity)

    def relabelled(self, labels: Tensor, label_names: Sequence[str]) -> PixelDataset:
        """The same images under other labels."""
        return ImagePixels(self._read, self._rows, labels, label_names, self.name, self._identity)

    def loaded(self) -> PixelDataset:
        """The same rows with their pixels in memory."""
        return PixelDataset(self.pixel_values, self.labels, self.label_names, self.name)


class _Reader:
    """Decodes rows of a dataset and sends them through an image processor."""

    def __init__(self, dataset: Any, column: str, name: str, make: PixelMaker, background: Any):
        self._dataset, self._column, self._name = dataset, column, name
        self._make, self._background = make, background

    def __call__(self, rows: Sequence[int], tally: ImageTally | None = None) -> Tensor:
        images = [
            read_image(
                self._dataset, row, self._column, self._name, mode=self._make.mode, background=self._background,
                tally=tally,
            )
            for row in rows
        ]
        return self._make(images, lambda number: place_of(self._dataset, rows[number], self._column, self._name))


def collate_pixels(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack rows of ``{"pixel_values", "labels"}`` (``label`` is accepted for ``labels``).

    Raises:
        DataError: rows that are no dicts, one without one of the two columns, pixels that are no floating-point C×H×W,
            images of different sizes, or NaN or infinite pixels.
    """
    if not isinstance(rows[0], Mapping):
        raise DataError(
            f"expected rows that are dicts, got a {type(rows[0]).__name__}: return {{'pixel_values': image, 'labels': "
            "label} from the dataset's __getitem__."
        )
    label = label_key(rows[0]) or "labels"
    for place, row in enumerate(rows):
        for column in ("pixel_values", label):
            if column not in row:
                raise DataError(
                    f"expected a '{column}' column, got {sorted(row)} in image {place} of a batch: preprocess images "
                    "to 'pixel_values' and name the label column 'labels'."
                )
    images = [as_pixels(row["pixel_values"], f"image {place} of a batch") for place, row in enumerate(rows)]
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


def as_pixels(value: Any, where: str) -> Tensor:
    """``pixel_values`` of one row as a floating-point C×H×W tensor.

    Raises:
        DataError: an image that was not preprocessed, integers, or another number of axes.
    """
    try:
        pixels = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"expected pixel_values that are numbers in {where}, got {type(value).__name__}: preprocess the images "
            "with the model's processor."
        ) from error
    if pixels.dim() != 3:
        first = " Take its first element." if pixels.dim() == 4 and len(pixels) == 1 else ""
        raise DataError(
            f"expected pixel_values of one image, C x H x W, in {where}, got shape {tuple(pixels.shape)}: the dataset "
            f"gives one image in a row, the collator makes the batch.{first}"
        )
    if not pixels.is_floating_point():
        raise DataError(
            f"expected floating-point pixel_values in {where}, got {pixels.dtype}: preprocess the images with the "
            "model's processor, which scales them."
        )
    return pixels


def preprocess(
    dataset: Any,
    processor: Any,
    *,
    label_names: Sequence[str],
    name: str,
    image_column: str = "image",
    label_column: str = "label",
    batch_size: int = _BLOCK,
    channels: int | None = None,
    background: str | tuple[int, int, int] = BACKGROUND,
    keep_bytes: int = KEPT_BYTES,
) -> PixelDataset:
    """Images of a ``datasets.Dataset`` or a list of dicts through an image processor, as pixels with labels.

    Pixels that take no more than ``keep_bytes`` are made once and kept. Rows of a larger dataset are decoded whenever
    they are read; of these the first ``batch_size`` are looked at now.

    Args:
        channels: 1 or 3, the model's ``num_channels``; by default one where the processor's ``image_mean`` holds one
            number, else three.
        background: what transparent parts of images show.

    Raises:
        DataError: empty dataset, missing column, an image that cannot be decoded (row and file are named), images of
            different sizes after the processor, or a processor for another number of channels.
    """
    columns = columns_of(dataset, name)
    if len(dataset) == 0:
        raise DataError(f"expected at least one row in {name}, got an empty dataset: check the split and the filter.")
    for option, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in columns:
            raise DataError(f"expected column '{column}' in {name}, got {columns}: set {option}.")
    make, tally = PixelMaker(processor, channels, name), ImageTally()
    read = _Reader(dataset, image_column, name, make, background)
    labels = torch.as_tensor(values_of(dataset, label_column, name))
    batches = places(len(dataset), batch_size)
    parts = [read(batches[0], tally)]
    size = len(dataset) * parts[0][0].numel() * parts[0].element_size()
    if size <= keep_bytes:
        for rows in tqdm(batches[1:], desc=f"pixels of {name}", leave=False, disable=None):
            parts.append(read(rows, tally))
    tally.tell(name, background)
    make.tell()
    if size <= keep_bytes:
        return PixelDataset(torch.cat(parts), labels, label_names, name)
    words = (described_processor(processor), make.channels, background)
    return ImagePixels(
        read, torch.arange(len(dataset)), labels, label_names, name, identity_of(dataset, image_column, *words)
    )
