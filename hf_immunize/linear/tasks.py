"""One linear task: rows, optional labels, and everything about them that the methods need, computed once.

Shape legend: N rows, D input width, E columns of an extractor, S = min(N, D).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_immunize.errors import DataError
from hf_immunize.linalg.factor import MomentFactor, factor_features, factor_moment


@dataclass(frozen=True)
class LinearTask:
    """A task as its second moment K = XᵀX (not centred) and, with labels, its least-squares problem."""

    factor: MomentFactor
    rows: int | None
    """N; None when only K is known."""
    triangle_SD: Tensor | None = None
    """R of X = QR: the least-squares problem without its N rows."""
    labels_S: Tensor | None = None
    """Qᵀy."""
    label_energy: float = 0.0
    """‖y‖²."""

    @classmethod
    def of_features(
        cls,
        features: Any,
        labels: Any = None,
        *,
        tolerance: float | None = None,
        feature_dtype: torch.dtype | None = None,
    ) -> LinearTask:
        """Build from N×D rows (tensor, array or ``datasets`` column) and, if given, N labels.

        Raises:
            DataError: ragged or non-numeric rows, or labels that do not fit.
            SpectrumError: rows that are not finite, or all zero.
        """
        rows = as_matrix(features)
        dtype = feature_dtype or rows.dtype
        if labels is None:
            return cls(factor_features(rows, tolerance=tolerance, feature_dtype=dtype), rows.shape[0])
        targets = as_matrix(labels).double().squeeze(1)
        if targets.dim() != 1 or targets.shape[0] != rows.shape[0]:
            raise DataError(
                f"expected one label for each of {rows.shape[0]} rows, got shape {tuple(targets.shape)}: regression "
                "targets or class values, one per row."
            )
        if not bool(torch.isfinite(targets).all()):
            raise DataError("expected finite labels, got NaN or infinity: drop or fill those rows.")
        # One QR of [X | y]: its last column is Qᵀy, and the N×D matrix Q is never formed.
        joint = torch.linalg.qr(torch.cat([rows.double(), targets[:, None]], dim=1), mode="r")[1]
        side = min(rows.shape)
        triangle, projected = joint[:side, : rows.shape[1]], joint[:side, rows.shape[1]]
        factor = factor_features(triangle, tolerance=tolerance, feature_dtype=dtype, rows=rows.shape[0])
        return cls(factor, rows.shape[0], triangle, projected, float(targets.square().sum()))

    @classmethod
    def of_moment(cls, moment: Any, *, tolerance: float | None = None) -> LinearTask:
        """Build from K alone: conditioning only, no loss. Raises SpectrumError for a K that is no second moment."""
        return cls(factor_moment(as_matrix(moment), tolerance=tolerance), None)

    @property
    def has_labels(self) -> bool:
        """Whether a loss can be computed."""
        return self.labels_S is not None

    def refit_loss(self, theta_DE: Tensor | None = None) -> float:
        """min_w ‖Xθw − y‖²/N: mean squared error of the best head without intercept (θ = I if None).

        Raises:
            DataError: the task has no labels.
        """
        if self.triangle_SD is None or self.labels_S is None or self.rows is None:
            raise DataError("expected a task with labels, got none: pass labels with the features.")
        triangle = self.triangle_SD if theta_DE is None else self.triangle_SD @ theta_DE.double()
        left, sigma, _ = torch.linalg.svd(triangle, full_matrices=False)
        noise = max(triangle.shape) * torch.finfo(triangle.dtype).eps
        kept = left[:, sigma > max(noise, self._fitted_tolerance(theta_DE)) * sigma[0]]
        inside = (kept.T @ self.labels_S).square().sum()
        return (self.label_energy - float(inside)) / self.rows

    def _fitted_tolerance(self, theta_DE: Tensor | None) -> float:
        """The task's own rank tolerance for raw rows; through θ only rounding is left out."""
        return self.factor.tolerance if theta_DE is None else 0.0


def as_matrix(values: Any) -> Tensor:
    """Rows as a floating N×D tensor from a tensor, an array, a list, or a ``datasets`` column (images are flattened).

    Integers become float64; floating dtypes are kept, because they decide the rank tolerance.

    Raises:
        DataError: ragged, empty or non-numeric values.
    """
    if isinstance(values, Tensor):
        tensor = values
    else:
        tensor = torch.from_numpy(_as_array(values))
    if tensor.dim() == 0 or tensor.numel() == 0:
        raise DataError(f"expected at least one row, got shape {tuple(tensor.shape)}.")
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise DataError(f"expected real numbers, got {tensor.dtype}.")
    tensor = tensor if tensor.is_floating_point() else tensor.double()
    return tensor.detach().reshape(tensor.shape[0], -1)


def _as_array(values: Any) -> np.ndarray:
    """A numeric NumPy array of anything that can be iterated by rows."""
    if not isinstance(values, np.ndarray):
        if not isinstance(values, Iterable) or isinstance(values, (str, bytes, dict)):
            raise DataError(
                f"expected rows as a tensor, an array or a datasets column, got {type(values).__name__}: pass "
                "dataset['column'], not the dataset."
            )
        rows = [np.asarray(row) for row in values]
        shapes = {row.shape for row in rows}
        if len(shapes) > 1:
            raise DataError(f"expected rows of one shape, got {len(shapes)} shapes such as {sorted(shapes)[:2]}.")
        values = np.stack(rows) if rows else np.empty((0, 0))
    if values.dtype.kind not in "fiu":
        raise DataError(
            f"expected numeric values, got dtype {values.dtype}: encode text columns as numbers and fill missing "
            "values first."
        )
    # float16/32/64 keep their precision; everything else has an exact float64.
    wide = values if values.dtype in (np.float16, np.float32, np.float64) else values.astype(np.float64)
    return np.ascontiguousarray(wide)
