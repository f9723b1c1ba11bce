"""Generalized eigenproblem K_H b = μ K_P b for second moments that may be singular and have different ranges.

Shape legend: D input width, C common directions, P primary-only, H harmful-only, O seen by neither; C + P + H + O = D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg.converging import converging
from hf_immunize.linalg.factor import MomentFactor


@dataclass(frozen=True)
class CommonPencil:
    """A basis of R^D in which both second moments are block diagonal, the common block being diag(1) and diag(μ).

    With T = [common, primary_only, harmful_only, neither] (invertible, D×D)

        TᵀK_PT = diag(I_C, I_P, 0, 0)     and     TᵀK_HT = diag(μ, 0, I_H, 0).

    μ are the finite nonzero generalized eigenvalues. The common block is the Schur complement on the quotient of
    R^D by null(K_P) + null(K_H), so it is the same for every invertible change of basis θ (an orthogonal projection
    of the inputs onto range(K_P) ∩ range(K_H) is not).
    """

    values_C: Tensor
    """μ, descending, positive."""
    common_DC: Tensor
    primary_only_DP: Tensor
    """Spans the directions of null(K_H) that K_P sees."""
    harmful_only_DH: Tensor
    neither_DO: Tensor
    tolerance: float
    """Relative singular values at or below this count as zero: the largest of both rank tolerances and of the angles
    by which rounding may have tilted a null space."""
    dropped: float
    """Largest relative singular value that was counted as zero in any of those decisions."""
    smallest_kept: float
    """Smallest relative singular value by which a task-only direction was told from an unseen one (1 if there is no
    such direction). ``dropped`` ≪ tolerance ≪ ``smallest_kept`` means that the block sizes do not depend on the
    tolerance."""

    @property
    def condition_number(self) -> float:
        """κ* = μ_max / μ_min (docs/condition-number-limits.md)."""
        return float(self.values_C[0] / self.values_C[-1])


@converging()
def common_pencil(primary: MomentFactor, harmful: MomentFactor) -> CommonPencil:
    """Block-diagonalize two second moments by congruence; O(D³), from factors, so K is never formed.

    Steps: split null(K_P) by how much K_H sees of it, and the reverse; take the part of R^D that is K_P-orthogonal to
    the primary-only and K_H-orthogonal to the harmful-only directions; whiten it by K_P; SVD of the harmful factor.

    Raises:
        SpectrumError: widths that differ, or ranges with no common direction.
    """
    if primary.width != harmful.width:
        raise SpectrumError(
            f"expected second moments of one width, got {primary.width} and {harmful.width}: use the same features "
            "for both tasks."
        )
    seen_h, in_null_p, only_h, tolerance = _seen_of_null(primary, harmful)
    left_p, seen_p, in_null_h = torch.linalg.svd(primary.factor_RD @ harmful.null_DZ, full_matrices=True)
    only_p = primary.rank + only_h - harmful.rank
    common = harmful.rank - only_h
    if common < 1:
        raise SpectrumError(
            f"expected ranges with a common direction, got ranks {primary.rank} and {harmful.rank} that share none "
            f"(tolerance {tolerance:.3g}): the tasks do not overlap, so a projection already separates them and no "
            "condition number is traded."
        )
    harmful_only = (primary.null_DZ @ in_null_p[:only_h].T) / seen_h[:only_h]
    primary_only = (harmful.null_DZ @ in_null_h[:only_p].T) / seen_p[:only_p]
    # Whitened primary coordinates that are orthogonal to those of the primary-only directions.
    whitened_DC = (primary.right_DR / primary.sigma_R) @ left_p[:, only_p:]
    root_mu, basis = _diagonalize(harmful, whitened_DC, harmful_only)
    seen_h, seen_p = seen_h / harmful.sigma_R[0], seen_p / primary.sigma_R[0]
    return CommonPencil(
        values_C=root_mu.square(),
        common_DC=basis,
        primary_only_DP=primary_only,
        harmful_only_DH=harmful_only,
        neither_DO=primary.null_DZ @ in_null_p[only_h:].T,
        tolerance=tolerance,
        dropped=max([primary.dropped, harmful.dropped, *seen_h[only_h:].tolist(), *seen_p[only_p:].tolist()]),
        smallest_kept=min([1.0, *seen_h[:only_h].tolist(), *seen_p[:only_p].tolist()]),
    )


def _diagonalize(harmful: MomentFactor, whitened_DC: Tensor, harmful_only_DH: Tensor) -> tuple[Tensor, Tensor]:
    """(√μ, common basis): make ``whitened_DC`` K_H-orthogonal to the harmful-only directions, then diagonalize K_H."""
    seen_RC, frame_RH = harmful.factor_RD @ whitened_DC, harmful.factor_RD @ harmful_only_DH
    overlap_HC = frame_RH.T @ seen_RC
    _, root_mu, rotation_t = torch.linalg.svd(seen_RC - frame_RH @ overlap_HC, full_matrices=False)
    return root_mu, (whitened_DC - harmful_only_DH @ overlap_HC) @ rotation_t.T


def _seen_of_null(primary: MomentFactor, harmful: MomentFactor) -> tuple[Tensor, Tensor, int, float]:
    """How much K_H sees of null(K_P): (singular values, right vectors, number above the tolerance, tolerance)."""
    tolerance = max(primary.tolerance, harmful.tolerance, primary.null_error)
    _, seen, right_t = torch.linalg.svd(harmful.factor_RD @ primary.null_DZ, full_matrices=True)
    above = int((seen > tolerance * harmful.sigma_R[0]).sum())
    return seen, right_t, max(above, harmful.rank - primary.rank), tolerance


@converging()
def union_basis(primary: MomentFactor, harmful: MomentFactor) -> Tensor:
    """Orthonormal basis (D×U) of range(K_P) + range(K_H)."""
    _, right_t, only_h, _ = _seen_of_null(primary, harmful)
    return torch.cat([primary.right_DR, primary.null_DZ @ right_t[:only_h].T], dim=1)
