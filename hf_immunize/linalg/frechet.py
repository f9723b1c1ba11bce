"""Fréchet distance between the Gaussians of two sets of features."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg.converging import converging
from hf_immunize.linalg.spectrum import check_features, to_double


@converging()
def frechet_distance(first_ND: Tensor, second_MD: Tensor) -> float:
    """‖μ₁ − μ₂‖² + Tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of features N×D and M×D (Dowson & Landau 1982; FID, Heusel et al. 2017).

    Σ are unbiased covariances. With Σᵢ = AᵢAᵢᵀ the trace of the root is the nuclear norm of A₁ᵀA₂: singular values in
    float64, no matrix root, no epsilon, exact for singular covariances. The figure falls with the number of rows:
    compare only distances from equally many.

    Raises:
        SpectrumError: not two finite floating matrices of one width with at least two rows each.
    """
    for features in (first_ND, second_MD):
        check_features(features)
        if len(features) < 2:
            raise SpectrumError(f"expected at least 2 rows for a covariance, got {len(features)}: draw more images.")
        if not bool(torch.isfinite(features).all()):
            raise SpectrumError("expected finite features, got NaN or infinity: check images and feature model.")
    if first_ND.shape[1] != second_MD.shape[1]:
        raise SpectrumError(
            f"expected features of one width, got {first_ND.shape[1]} and {second_MD.shape[1]}: use one feature model."
        )
    (mean, root), (other_mean, other_root) = (_moments(to_double(rows)) for rows in (first_ND, second_MD))
    shared = torch.linalg.matrix_norm(root @ other_root.mT, ord="nuc")
    spread = root.square().sum() + other_root.square().sum() - 2 * shared
    return float((mean - other_mean).square().sum() + spread.clamp_min(0))


def _moments(rows_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and R (at most D rows) with RᵀR = the covariance."""
    mean = rows_ND.mean(dim=0)
    centered = (rows_ND - mean) / (len(rows_ND) - 1) ** 0.5
    return mean, centered if len(centered) <= centered.shape[1] else torch.linalg.qr(centered, mode="r").R
