"""Affine changes of features that an attacker may make before probing: centre, standardize, whiten.

Shape legend: N rows (samples), D columns (feature width), R the rank kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg.converging import converging
from hf_immunize.linalg.spectrum import check_features, singular_value_floor, to_double

FEATURE_MAPS = ("raw", "centered", "standardized", "whitened")


@dataclass(frozen=True)
class FeatureMap:
    """x ↦ (x − mean)·matrix in float64, fitted on some rows and applied to any."""

    mean_1D: Tensor
    matrix_DD: Tensor

    def __call__(self, features_ND: Tensor) -> Tensor:
        """Mapped features, N×D float64."""
        return (to_double(features_ND) - self.mean_1D) @ self.matrix_DD


@converging()
def fit_feature_map(features_ND: Tensor, kind: str) -> FeatureMap:
    """Fit one of FEATURE_MAPS on the attacker's training rows Φ (N×D).

    - ``raw``: nothing is changed.
    - ``centered``: column means are subtracted and all columns divided by one scalar, σ₁(Φ_c)/√N, so that the largest
      eigenvalue of the second moment is 1. The shape of the spectrum stays as it was.
    - ``standardized``: every column gets mean 0 and standard deviation 1.
    - ``whitened``: (x − mean)·V·diag(√N/σ_i): second moment the identity on the numerical range.

    Columns and directions below the features' own rounding noise (``singular_value_floor``) become zero: a model that
    maps every image to one point leaves the attacker nothing but a bias.

    Raises:
        SpectrumError: not a floating matrix, or an unknown kind.
    """
    check_features(features_ND)
    if kind not in FEATURE_MAPS:
        raise SpectrumError(f"expected a feature map in {FEATURE_MAPS}, got {kind!r}.")
    raw = to_double(features_ND)
    rows, width = raw.shape
    eye = torch.eye(width, dtype=raw.dtype, device=raw.device)
    if kind == "raw":
        return FeatureMap(torch.zeros_like(raw[:1]), eye)
    mean = raw.mean(dim=0, keepdim=True)
    norm = torch.linalg.vector_norm(raw)
    floor = singular_value_floor(norm, norm, rows, width, features_ND.dtype)
    _, sigma, right = torch.linalg.svd(raw - mean, full_matrices=False)
    if kind == "centered":
        return FeatureMap(mean, eye * _inverse_above(sigma[0], floor) * math.sqrt(rows))
    if kind == "standardized":
        column_norm = torch.linalg.vector_norm(raw - mean, dim=0)
        return FeatureMap(mean, torch.diag(_inverse_above(column_norm, floor) * math.sqrt(rows)))
    return FeatureMap(mean, (right.mT * (_inverse_above(sigma, floor) * math.sqrt(rows))) @ right)


def _inverse_above(values: Tensor, floor: Tensor) -> Tensor:
    """1/value where a value exceeds ``floor``, else 0."""
    kept = values > floor
    return torch.where(kept, 1 / torch.where(kept, values, torch.ones_like(values)), torch.zeros_like(values))
