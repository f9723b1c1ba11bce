"""Images that differ by their number, as files, folders and tables."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from PIL import ImageFilter


def noise(number: int, size: int = 8) -> PILImage.Image:
    """An image of its own for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return PILImage.fromarray(pixels)


def scene(number: int, size: int = 96) -> PILImage.Image:
    """Coloured blobs at random places: smooth, as photos are, and unlike every other number's."""
    draw = np.random.default_rng(number)
    small = PILImage.fromarray(draw.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return small.resize((size, size), PILImage.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))


def write_images(folder: Path, names: Iterable[str], start: int = 0) -> Path:
    """Images at these paths below a folder."""
    for number, name in enumerate(names, start):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(number).save(path, "PNG")
    return folder


def write_classes(folder: Path, classes: Iterable[str], each: int = 3, start: int = 0) -> Path:
    """One sub-folder with images for each class."""
    return write_images(folder, [f"{name}/{number}.png" for name in classes for number in range(each)], start)


def table(rows: int, start: int = 0, names: tuple[str, ...] = ("a", "b"), columns=("image", "label")) -> Dataset:
    """Images and labels in turn."""
    images = [noise(start + row) for row in range(rows)]
    labels = [row % len(names) for row in range(rows)]
    features = Features({columns[0]: Image(), columns[1]: ClassLabel(names=list(names))})
    return Dataset.from_dict({columns[0]: images, columns[1]: labels}, features)
