"""Linear maps between two sets of features of the same rows, and low-rank parts of a matrix.

Shape legend: N rows (samples), D and E columns (feature widths of source and target).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg.converging import converging
from hf_immunize.linalg.spectrum import check_features, to_double
from hf_immunize.linalg.whitening import FeatureMap, fit_feature_map


@dataclass(frozen=True)
class LinearMap:
    """x ↦ W(x)·M + mean in float64, W the whitening of the source's numerical range."""

    whitening: FeatureMap
    matrix_DE: Tensor
    mean_1E: Tensor

    def __call__(self, source_ND: Tensor) -> Tensor:
        """Mapped features, N×E float64."""
        return self.whitening(source_ND) @ self.matrix_DE + self.mean_1E

    def explained(self, source_ND: Tensor, target_NE: Tensor) -> float:
        """R² of the map on these rows: 1 − ‖target − mapped‖²/‖target − its mean‖²; 0 for a constant target."""
        target = to_double(target_NE)
        total = (target - target.mean(dim=0)).square().sum()
        return float(1 - (target - self(source_ND)).square().sum() / total) if total > 0 else 0.0


def fit_linear_map(source_ND: Tensor, target_NE: Tensor) -> LinearMap:
    """Least squares with an intercept, min ‖(Φ − mean)·A − (Ψ − mean)‖², on the numerical range of Φ.

    With Z the whitened source (ZᵀZ = N·P, P the projection on the range) the solution is M = Zᵀ(Ψ − mean)/N; directions
    below the source's own rounding noise are left out, so an ill-conditioned layer is inverted as far as it can be.

    Raises:
        SpectrumError: not floating matrices over the same rows.
    """
    for features in (source_ND, target_NE):
        check_features(features)
    if len(source_ND) != len(target_NE):
        raise SpectrumError(
            f"expected source and target features of the same rows, got {len(source_ND)} and {len(target_NE)}."
        )
    whitening = fit_feature_map(source_ND, "whitened")
    white, target = whitening(source_ND), to_double(target_NE)
    mean = target.mean(dim=0, keepdim=True)
    return LinearMap(whitening, white.T @ (target - mean) / len(white), mean)


@converging()
def truncated(matrix_DE: Tensor, rank: int) -> Tensor:
    """The best approximation of rank at most ``rank`` in every unitarily invariant norm (Eckart, Young 1936)."""
    left, sigma, right = torch.linalg.svd(to_double(matrix_DE), full_matrices=False)
    kept: Tensor = (left[:, :rank] * sigma[:rank]) @ right[:rank]
    return kept.to(matrix_DE)
