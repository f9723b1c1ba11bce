"""Which columns of a dataset hold the images and the labels: those that are named, else the only ones that can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_immunize.data.rows import values_of
from hf_immunize.errors import DataError

_LABELS = (
    "label", "labels", "fine_label", "coarse_label", "class", "classes", "class_name", "class_label", "category",
    "target", "y", "label_id", "label_ids", "class_id", "cls",
)  # fmt: skip


def image_candidates(dataset: Any) -> list[str]:
    """Columns of images."""
    from datasets import Image

    return [column for column, feature in dataset.features.items() if isinstance(feature, Image)]


def label_candidates(dataset: Any) -> list[str]:
    """Columns of classes: typed as such, or called as labels usually are."""
    from datasets import ClassLabel, Image

    return [
        column for column, feature in dataset.features.items()
        if isinstance(feature, ClassLabel) or (column.lower() in _LABELS and not isinstance(feature, Image))
    ]  # fmt: skip


def find_columns(
    dataset: Any, image: str | None, label: str | None, *, side: str, shared: tuple[str, str]
) -> tuple[str, str]:
    """The image and the label column of one side's dataset.

    Args:
        dataset: a ``datasets.Dataset``.
        image, label: the side's own options; None leaves it to the shared ones.
        side: ``primary``, ``harmful`` or ``benign``, for errors.
        shared: ``image_column`` and ``label_column``. Where a dataset has none of that name, the only candidate is it.

    Raises:
        DataError: a named column that is not there, and no candidate, or several (they are listed).
    """
    found: dict[str, str] = {}
    kinds = (("image", image, shared[0], image_candidates), ("label", label, shared[1], label_candidates))
    for kind, own, usual, candidates in kinds:
        name = own or usual
        if name in dataset.column_names:
            found[kind] = name
            continue
        can = [] if own else candidates(dataset)
        if len(can) != 1:
            raise _no_column(kind, name, can, dataset, side)
        found[kind] = can[0]
    return found["image"], found["label"]


def read_groups(dataset: Any, rows: Sequence[int], column: str | None, side: str) -> list[Any] | None:
    """What each of these rows belongs to; None where no column says so.

    Raises:
        DataError: no such column, a value that is missing, or values that cannot be compared.
    """
    if column is None:
        return None
    if column not in dataset.column_names:
        raise DataError(
            f"expected column {column!r} in the {side} dataset, which {side}_group_column or group_column names, got "
            f"{dataset.column_names}."
        )
    values = values_of(dataset, column, f"the {side} dataset")
    found = [values[row] for row in rows]
    for row, value in zip(rows, found, strict=True):
        if not isinstance(value, str | int):
            raise DataError(
                f"expected text or an integer in column {column!r} of the {side} dataset, got {value!r} in row {row}: "
                "name what each image belongs to, images that belong to nothing by a name of their own."
            )
    return found


def _no_column(kind: str, name: str, can: list[str], dataset: Any, side: str) -> DataError:
    option = f"{side}_{kind}_column" if side else f"{kind}_column"
    hint = f"set {option} or {kind}_column" if side else f"set {option}"
    if can:
        hint += f" to one of {can}"
    elif kind == "label" and not set(dataset.column_names) - {"image"}:
        hint = "put the images of each class into a sub-folder"
    which = f"the {side} dataset" if side else "the dataset"
    return DataError(f"expected column '{name}' in {which}, got {dataset.column_names}: {hint}.")
