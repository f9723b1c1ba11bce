"""Labels of any map-style dataset, checked before training starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_immunize.data.pixels import as_pixels
from hf_immunize.data.rows import (
    NamedRows,
    as_mapping,
    check_rows,
    columns_of,
    fetch,
    has_transform,
    is_table,
    label_key,
    values_of,
)
from hf_immunize.errors import DataError

FEW = 6
"""Rows that are read to see what a dataset gives, before anything is trained."""


@dataclass(frozen=True)
class Labels:
    """Where the labels of a dataset are, and all of them where they can be had without reading rows.

    Args:
        key: the column; None where rows have no label.
        values: one for each row; None where the rows have to be read for them.
        sampled: of the rows that were read.
        rows: those rows, ``FEW`` at most, the first one among them or not.
        made: whether a transform makes the rows, so that its labels were compared with ``values`` in a few rows only.
    """

    key: str | None
    values: Sequence[Any] | Tensor | None = None
    sampled: tuple[Any, ...] = ()
    made: bool = False
    rows: tuple[Mapping[str, Any], ...] = ()


def find_labels(dataset: Any, name: str) -> Labels:
    """Labels by a ``labels`` tensor as attribute, by a column, or in rows that lie in memory; else where they are.

    No more than ``FEW`` rows are read of a dataset that is not in memory. Where a transform makes the rows of a
    ``datasets.Dataset``, it makes the labels too: those of the column count where they are the same in a row of each
    of a few classes.

    Raises:
        DataError: no dataset with numbered rows, an empty one, rows that are no dicts, or a row that cannot be read.
    """
    check_rows(dataset, name)
    if len(dataset) == 0:
        raise DataError(f"expected at least one row in {name}, got an empty dataset: check its split and filter.")
    if isinstance(held := _attribute(dataset), Tensor):
        if held.dim() == 0 or len(held) != len(dataset):
            told = "one number" if held.dim() == 0 else f"{len(held)}"
            raise DataError(f"expected as many labels as rows in the attribute labels of {name}, {len(dataset)}, got "
                            f"{told}: give those of its rows, in their order, or remove the attribute.")
        return Labels("labels", held)
    if isinstance(dataset, list | tuple):
        key = label_key(as_mapping(fetch(dataset, 0, name), 0, name))
        return Labels(key, None if key is None else _OnlyLabels(key, name)(dataset))
    if is_table(dataset) and not has_transform(dataset):
        key = label_key(columns_of(dataset, name))
        return Labels(key, None if key is None else values_of(dataset, key, name))
    key = label_key(as_mapping(fetch(dataset, 0, name), 0, name))
    if key is None:
        return Labels(None)
    stored = label_key(dataset.column_names) if is_table(dataset) else None
    if stored is not None:
        values = values_of(dataset, stored, name)
        places = _different(values)
        rows = tuple(fetch(dataset, row, name) for row in places)
        if all(_same(made[key], values[row]) for made, row in zip(rows, places, strict=True)):
            return Labels(key, values, made=True, rows=rows)
    few = range(min(FEW, len(dataset)))
    rows = tuple(as_mapping(fetch(dataset, row, name), row, name) for row in few)
    return Labels(key, sampled=tuple(row[key] for row in rows), rows=rows)


def _attribute(dataset: Any) -> Any:
    try:
        return getattr(dataset, "labels", None)
    except Exception:  # a property of a dataset that has none
        return None


def _same(made: Any, stored: Any) -> bool:
    try:
        return torch.equal(torch.as_tensor(made).double(), torch.as_tensor(stored).double())
    except (TypeError, ValueError, RuntimeError):
        return bool(made == stored)


def _different(values: Sequence[Any]) -> list[int]:
    """The first row of each of ``FEW`` labels; of fewer, other rows too."""
    rows: dict[str, int] = {}
    for row, value in enumerate(values):
        if len(rows) < FEW:
            rows.setdefault(repr(value), row)
    return list(dict.fromkeys([*rows.values(), *range(len(values))]))[:FEW]


def read_labels(dataset: Any, key: str, name: str, *, workers: int = 0) -> list[Any]:
    """The label of every row, each row read once, with a progress bar; ``workers`` processes read them.

    Raises:
        DataError: a row that cannot be read, or has no label.
    """
    rows = NamedRows(dataset, name)
    loader = DataLoader(rows, batch_size=64, num_workers=workers, collate_fn=_OnlyLabels(key, name))
    found: list[Any] = []
    with tqdm(total=len(dataset), desc=f"labels of {name}", unit="row", leave=False, disable=None) as bar:
        for part in loader:
            found += part
            bar.update(len(part))
    return found


class _OnlyLabels:
    """Labels of some rows, without what lies beside them."""

    def __init__(self, key: str, name: str):
        self._key, self._name = key, name

    def __call__(self, rows: Sequence[Any]) -> list[Any]:
        found = []
        for place, row in enumerate(rows):
            if self._key not in as_mapping(row, place, self._name):
                raise DataError(f"expected a {self._key!r} column in every row of {self._name}, got {sorted(row)}.")
            found.append(row[self._key])
        return found


def labels_of(dataset: Any, name: str) -> list[int]:
    """Integer labels of every row: from a ``labels`` attribute, a label column, or by reading each row once.

    Where a transform makes the rows of a ``datasets.Dataset``, it makes the labels too: each row is read unless a few
    of them show that they are those of the column (``find_labels``).

    Raises:
        DataError: no dataset with numbered rows, an empty one, rows that are no dicts, no label column, a row that
            cannot be read, or labels that are not integers.
    """
    found = find_labels(dataset, name)
    if found.key is None:
        keys = columns_of(dataset, name)
        raise DataError(f"expected a 'labels' column in {name}, got {keys}: rename the label column to 'labels'.")
    values = read_labels(dataset, found.key, name) if found.values is None else found.values
    values = values.tolist() if isinstance(values, Tensor) else values
    return [whole_number(label, row, name) for row, label in enumerate(values)]


def whole_number(label: Any, row: int, name: str) -> int:
    """One label as an integer. Raises DataError for one that is none; the row is named."""
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
    names = getattr(column, "names", None)
    return list(names) if names else None


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
    return pixel_shape(as_mapping(fetch(dataset, 0, name), 0, name), name)


def pixel_shape(row: Mapping[str, Any], name: str) -> torch.Size:
    """Shape of ``pixel_values`` of the first row. Raises DataError as ``check_sample``."""
    if "pixel_values" not in row:
        raise DataError(
            f"expected a 'pixel_values' column in {name}, got {sorted(row)}: preprocess the images with the model's "
            "processor, with dataset.with_transform for instance."
        )
    return as_pixels(row["pixel_values"], f"row 0 of {name}").shape
