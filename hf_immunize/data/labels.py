"""Labels of any map-style dataset, checked before training starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from hf_immunize.data.rows import NamedRows
from hf_immunize.errors import DataError


def labels_of(dataset: Any, name: str) -> list[int]:
    """Integer labels of every row: from a ``labels`` attribute, a label column, or by reading each row once.

    Raises:
        DataError: an empty dataset, no label column, a row that cannot be read, or labels that are not integers.
    """
    if len(dataset) == 0:
        raise DataError(f"expected at least one row in {name}, got an empty dataset: check its split and filter.")
    columns = getattr(dataset, "column_names", None)
    if isinstance(getattr(dataset, "labels", None), torch.Tensor):
        found: Sequence[Any] = dataset.labels.tolist()
    elif columns is not None and {"labels", "label"} & set(columns):
        found = dataset["labels" if "labels" in columns else "label"][:]
    else:
        keys = sorted(dataset[0]) if isinstance(dataset[0], dict) else type(dataset[0]).__name__
        key = next((column for column in ("labels", "label") if column in keys), None)
        if key is None:
            raise DataError(f"expected a 'labels' column in {name}, got {keys}: rename the label column to 'labels'.")
        rows = NamedRows(dataset, name)
        found = [rows[row][key] for row in range(len(rows))]
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
    """Shape of the first row's ``pixel_values``. Raises DataError when the row has no such column."""
    row = dataset[0]
    if not isinstance(row, dict) or "pixel_values" not in row:
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(
            f"expected a 'pixel_values' column in {name}, got {keys}: preprocess the images with the model's processor."
        )
    return torch.as_tensor(row["pixel_values"]).shape
