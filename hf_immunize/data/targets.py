"""What the rows of a task are labelled with: one class each, several labels at once, numbers, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hf_immunize.data.labels import whole_number
from hf_immunize.errors import DataError

Kind = Literal["classes", "multi-label", "regression", "unlabelled"]


@dataclass(frozen=True)
class Targets:
    """Labels of N rows.

    Args:
        kind: ``classes``: one integer for each row; ``multi-label``: a vector of 0 and 1; ``regression``: a number or a
            vector of numbers; ``unlabelled``: nothing.
        values: N integers, N×K or N floating-point numbers; N zeros where there are no labels.
    """

    kind: Kind
    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    @property
    def tells_apart(self) -> int:
        """How many classes there are; 0 for rows that have none."""
        return len(self.values.unique()) if self.kind == "classes" else 0

    @property
    def told(self) -> str:
        """What the rows are labelled with, in words."""
        if self.kind == "classes":
            return f"{self.tells_apart} class{'' if self.tells_apart == 1 else 'es'}"
        return {"multi-label": "several labels in a row", "regression": "numbers as labels"}.get(self.kind, "no labels")


def unlabelled(rows: int) -> Targets:
    """Rows without labels."""
    return Targets("unlabelled", torch.zeros(rows, dtype=torch.long))


def targets_of(values: Sequence[Any] | Tensor, name: str) -> Targets:
    """Labels as they are stored, one entry for each row, as classes, several labels or numbers.

    Whole numbers, also as floats, are classes; vectors of nothing but 0 and 1 are several labels at once; other
    vectors, and floating-point numbers some of which are no whole ones, are numbers to be predicted.

    Raises:
        DataError: an entry that is neither, vectors of different lengths, or numbers that are not finite.
    """
    if _are_vectors(values):
        return _of_vectors(values, name)
    if isinstance(values, Tensor):
        values = values.tolist()
    if all(isinstance(value, float | np.floating) or _is_floating(value) for value in values):
        numbers = torch.tensor([float(value) for value in values], dtype=torch.float64)
        if bool((numbers.isfinite() & (numbers != numbers.round())).any()):
            return Targets("regression", _finite(numbers, name).float())
    return Targets("classes", torch.tensor([whole_number(value, row, name) for row, value in enumerate(values)]))


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def _are_vectors(values: Sequence[Any] | Tensor) -> bool:
    if isinstance(values, Tensor):
        return values.dim() > 1
    return any(isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0 for value in values)


def _of_vectors(values: Sequence[Any] | Tensor, name: str) -> Targets:
    try:
        rows = [torch.as_tensor(value, dtype=torch.float64) for value in values]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"expected a number, or a vector of numbers, as the label of each row in {name}, got {error}: convert them."
        ) from error
    shapes = {tuple(row.shape) for row in rows}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        raise DataError(
            f"expected label vectors of one length in {name}, got shapes {sorted(shapes)[:5]}: write several classes "
            "of an image as a vector of 0 and 1, one place for each class."
        )
    whole = _finite(torch.stack(rows), name)
    kind: Kind = "multi-label" if bool(((whole == 0) | (whole == 1)).all()) else "regression"
    return Targets(kind, whole.float())


def _finite(numbers: Tensor, name: str) -> Tensor:
    bad = ~numbers.isfinite()
    if bool(bad.any()):
        row = int(bad.reshape(len(bad), -1).any(dim=1).nonzero()[0])
        raise DataError(f"expected finite labels in {name}, got {numbers[row].tolist()} in row {row}: remove it.")
    return numbers
