"""Linear probing by gradient descent with exact line search, all seeds at once (Fig. 1 of Zheng et al. 2025).

Shape legend: N rows, D feature width, S seeds, T steps, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_immunize.errors import DataError
from hf_immunize.linalg.factor import factor_features


@dataclass(frozen=True)
class ProbeCurves:
    """Curves of S probes over T steps; entry 0 is the start."""

    norm_ratio_ST: Tensor
    """‖w_t − w*‖²/‖w_0 − w*‖², w* the minimizer nearest to w_0."""
    excess_loss_ST: Tensor
    """(L(w_t) − L(w*))/(L(0) − L(w*)): 1 = as bad as no head at all."""

    def steps_to(self, level: float) -> list[int | None]:
        """Per seed the first step whose excess loss stays at or below ``level``; None = not within these steps.

        Exact line search never raises the loss, so the first such step is also the one that holds.
        """
        reached = self.excess_loss_ST <= level
        return [int(row.int().argmax()) if bool(row.any()) else None for row in reached]


def line_search_probe(
    features_ND: Tensor,
    labels_N: Tensor,
    *,
    steps: int = 200,
    seeds: int = 5,
    initial_scale: float = 1.0,
    first_seed: int = 0,
    whitened: bool = False,
    tolerance: float | None = None,
) -> ProbeCurves:
    """Minimize ‖Φw − y‖² from S random heads by gradient descent with the best rate at every step.

    In the eigenbasis of H = ΦᵀΦ the error obeys e ← (1 − αλ)e with α = Σλ²e²/Σλ³e², so one SVD serves every seed.
    ``whitened`` runs the same descent on Φ(ΦᵀΦ)^{-1/2}: the attacker to whom κ means nothing.

    Args:
        features_ND: N×D features, through θ if there is one.
        labels_N: N targets.
        seeds: S; heads are Gaussian with standard deviation ``initial_scale`` (0: all start from w = 0), seeded
            ``first_seed`` and on.
        whitened: give the attacker whitened features.

    Raises:
        DataError: labels that do not match the rows, or that the features cannot reduce the loss on.
        SpectrumError: features without a spectrum.
    """
    if labels_N.shape != features_ND.shape[:1]:
        raise DataError(f"expected {features_ND.shape[0]} labels, got shape {tuple(labels_N.shape)}.")
    factor = factor_features(features_ND, tolerance=tolerance)
    cross_R = factor.right_DR.T @ (features_ND.double().T @ labels_N.double())
    if whitened:
        lam_R, solution_R = torch.ones_like(factor.sigma_R), cross_R / factor.sigma_R
    else:
        lam_R, solution_R = factor.sigma_R.square(), cross_R / factor.sigma_R.square()
    baseline = float((lam_R * solution_R.square()).sum())
    if not baseline > 0:
        raise DataError("expected labels that correlate with some feature, got none: the zero head is already best.")
    start_SD = torch.stack([_gaussian_head(factor.width, first_seed + index) for index in range(seeds)])
    error_SR = initial_scale * start_SD @ factor.right_DR - solution_R
    return _descend(error_SR, lam_R, baseline, steps)


def _gaussian_head(width: int, seed: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)).double()


def _descend(error_SR: Tensor, lam_R: Tensor, baseline: float, steps: int) -> ProbeCurves:
    """Exact line search on ½Σλe², for all rows of e at once."""
    norms, losses = [], []
    first_S = error_SR.square().sum(dim=1)
    for step in range(steps + 1):
        norms.append(error_SR.square().sum(dim=1) / first_S)
        losses.append((lam_R * error_SR.square()).sum(dim=1) / baseline)
        if step < steps:
            gradient = lam_R * error_SR
            top, bottom = gradient.square().sum(dim=1), (lam_R * gradient.square()).sum(dim=1)
            rate = torch.where(bottom > 0, top / bottom, torch.zeros_like(top))
            error_SR = error_SR - rate[:, None] * gradient
    return ProbeCurves(torch.stack(norms, dim=1), torch.stack(losses, dim=1))
