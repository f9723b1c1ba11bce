"""Labels of any map-style dataset, checked before training starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_immunize.data.pixels import as_pixels
from hf_immunize.data.rows import as_mapping, check_rows, columns_of, fetch, has_transform, values_of
from hf_immunize.errors import DataError


def labels_of(dataset: Any, name: str) -> list[int]:
    """Integer labels of every row: from a ``labels`` attribute, a label column, or by reading each row once.

    Where a transform makes the rows of a ``datasets.Dataset``, it makes the labels too: each row is read.

    Raises:
        DataError: no dataset with numbered rows, an empty one, rows that are no dicts, no label column, a row that
            cannot be read, or labels that are not integers.
    """
    check_rows(dataset, name)
    if len(dataset) == 0:
        raise DataError(f"expected at least one row in {name}, got an empty dataset: check its split and filter.")
    if isinstance(getattr(dataset, "labels", None), torch.Tensor):
        found: Sequence[Any] = dataset.labels.tolist()
    else:
        made = getattr(dataset, "column_names", None) is None or has_transform(dataset)
        keys = sorted(as_mapping(fetch(dataset, 0, name), 0, name)) if made else columns_of(dataset, name)
        key = next((column for column in ("labels", "label") if column in keys), None)
        if key is None:
            raise DataError(f"expected a 'labels' column in {name}, got {keys}: rename the label column to 'labels'.")
        rows = tqdm(range(len(dataset)), desc=f"labels of {name}", leave=False, disable=None)
        found = [fetch(dataset, row, name)[key] for row in rows] if made else values_of(dataset, key, name)
    return [_whole(label, row, name) for row, label in enumerate(found)]


def _whole(label: Any, row: int, name: str) -> int:
    try:
        whole = int(label)
        if not isinstance(label, str) and whole != label:
            raise ValueError(f"{label} is not a whole number")
        return whole
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise DataError(
            f"expected one integer label per row in {name}, got {label!r} in row {row}: {error}. Drop rows without a "
            "label, and number the classes from 0."
        ) from error


def check_label_range(labels: Sequence[int], classes: int, name: str) -> None:
    """Raise DataError when a label is outside 0..classes-1, or when fewer than two classes are asked for."""
    if classes < 2:
        raise DataError(f"expected at least two classes in {name}, got {classes}: a classifier needs a choice.")
    for row, label in enumerate(labels):
        if not 0 <= label < classes:
            raise DataError(
                f"expected labels in 0..{classes - 1} in {name}, got {label} in row {row}: fix the label column or the "
                "model's num_labels."
            )


def label_names_of(dataset: Any) -> list[str] | None:
    """Names of the classes, where the dataset has them: a ``label_names`` attribute or a ClassLabel column."""
    if getattr(dataset, "label_names", None) is not None:
        return list(dataset.label_names)
    features = getattr(dataset, "features", None) or {}
    column = next((features[name] for name in ("labels", "label") if name in features), None)
    return list(column.names) if getattr(column, "names", None) else None


def check_classes(labels: Sequence[int], names: Iterable[Any], name: str) -> None:
    """Raise DataError when a class has no row: no batch would show it, and no attacker would be held up at it."""
    present = set(labels)
    missing = [f"{label} ({called})" for label, called in enumerate(names) if label not in present]
    if missing:
        raise DataError(
            f"expected rows of every class in {name}, got none of class {', '.join(missing[:10])}: add such rows, or "
            "number the classes that are there from 0 without gaps."
        )


def check_sample(dataset: Any, name: str) -> torch.Size:
    """Shape of the first row's ``pixel_values``.

    Raises:
        DataError: a row that cannot be read, is no dict or has no such column, or pixels that are no floating-point
            C×H×W.
    """
    row = as_mapping(fetch(dataset, 0, name), 0, name)
    if "pixel_values" not in row:
        raise DataError(
            f"expected a 'pixel_values' column in {name}, got {sorted(row)}: preprocess the images with the model's "
            "processor, with dataset.with_transform for instance."
        )
    return as_pixels(row["pixel_values"], f"row 0 of {name}").shape
