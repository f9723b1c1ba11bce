"""The largest condition-number gap that any linear extractor can open, and diagnostics that need no training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_immunize.linalg.factor import MomentFactor
from hf_immunize.linalg.pencil import CommonPencil, common_pencil
from hf_immunize.linear.tasks import LinearTask

WORTHWHILE = 1.01
"""A limit on RIR below this is called impossible: one percent of conditioning protects nothing."""


@dataclass(frozen=True)
class ImmunizationLimit:
    """What linear immunization can reach for one pair of tasks (docs/condition-number-limits.md)."""

    condition_limit: float
    """κ* = μ_max/μ_min: no θ makes κ(H_H)/κ(H_P) larger on the common range."""
    ratio_limit: float
    """Largest RIR on the common range: κ*·κ_C(K_P)/κ_C(K_H)."""
    whole_range_ratio: float
    """κ*·κ(K_P)/κ(K_H) with κ over each task's whole range: what the closed form attains there."""
    whole_range_bounded: bool
    """True when harmful data lie in the primary range: then ``whole_range_ratio`` bounds every invertible θ. False:
    scaling a harmful-only direction costs the primary task nothing and makes κ(H_H) as large as one likes."""
    primary_condition: float
    harmful_condition: float
    primary_common_condition: float
    harmful_common_condition: float
    common_rank: int
    primary_only_rank: int
    harmful_only_rank: int
    tolerance: float
    dropped: float
    smallest_kept: float
    covariance_cosine: float
    """⟨K_P, K_H⟩/(‖K_P‖_F‖K_H‖_F): 1 exactly when the covariances are proportional."""
    commutator: float
    """‖K_PK_H − K_HK_P‖_F/(2‖K_PK_H‖_F): 0 exactly when they share eigenvectors, so that the only angle freedom of
    Prop. 3.2 is a permutation."""
    possible: bool
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)


def immunization_limit(primary: Any, harmful: Any, *, tolerance: float | None = None) -> ImmunizationLimit:
    """Limit for two tasks, each a LinearTask or a second moment K (D×D tensor or array).

    Raises:
        SpectrumError: a K that is not finite, symmetric, positive semidefinite and nonzero, widths that differ, or
            ranges with no common direction.
    """
    factors = [
        task.factor if isinstance(task, LinearTask) else LinearTask.of_moment(task, tolerance=tolerance).factor
        for task in (primary, harmful)
    ]
    return limit_of(factors[0], factors[1], common_pencil(factors[0], factors[1]))


def limit_of(primary: MomentFactor, harmful: MomentFactor, pencil: CommonPencil) -> ImmunizationLimit:
    """The limit from factors and their pencil."""
    common_p, common_h = common_range_conditions(pencil)
    star = pencil.condition_number
    ratio = star * common_p / common_h
    cosine, commutator = covariance_angles(primary, harmful)
    possible, reason = _verdict(ratio, cosine, commutator, pencil)
    return ImmunizationLimit(
        condition_limit=star,
        ratio_limit=ratio,
        whole_range_ratio=star * primary.condition_number / harmful.condition_number,
        whole_range_bounded=pencil.harmful_only_DH.shape[1] == 0,
        primary_condition=primary.condition_number,
        harmful_condition=harmful.condition_number,
        primary_common_condition=common_p,
        harmful_common_condition=common_h,
        common_rank=pencil.values_C.shape[0],
        primary_only_rank=pencil.primary_only_DP.shape[1],
        harmful_only_rank=pencil.harmful_only_DH.shape[1],
        tolerance=pencil.tolerance,
        dropped=pencil.dropped,
        smallest_kept=pencil.smallest_kept,
        covariance_cosine=cosine,
        commutator=commutator,
        possible=possible,
        reason=reason,
    )


def common_range_conditions(pencil: CommonPencil, theta_DD: Tensor | None = None) -> tuple[float, float]:
    """κ of both second moments on the common range of the features xᵀθ (θ invertible; I if None).

    The common range is the orthogonal complement of null(H_P) + null(H_H) in feature space, the forms on it are Schur
    complements: task-only directions are regressed out. Their ratio κ_H/κ_P never exceeds κ*.
    """
    alone = torch.cat([pencil.primary_only_DP, pencil.harmful_only_DH, pencil.neither_DO], dim=1)
    common = pencil.common_DC
    if theta_DD is not None:
        theta = theta_DD.to(common)
        common, alone = torch.linalg.solve(theta, common), torch.linalg.solve(theta, alone)
    if alone.shape[1]:
        # Columns are scaled to unit length: only their span matters, and scales may differ by many decades.
        frame = torch.linalg.qr(alone / torch.linalg.vector_norm(alone, dim=0), mode="complete")[0]
        common = frame[:, alone.shape[1] :].T @ common
    primary = torch.linalg.svdvals(common)
    harmful = torch.linalg.svdvals(common / pencil.values_C.sqrt())
    return float((primary[0] / primary[-1]).square()), float((harmful[0] / harmful[-1]).square())


def covariance_angles(primary: MomentFactor, harmful: MomentFactor) -> tuple[float, float]:
    """(cosine between K_P and K_H as matrices, relative commutator): 1 and 0 when aligned."""
    k_p, k_h = primary.moment_DD, harmful.moment_DD
    k_p, k_h = k_p / torch.linalg.matrix_norm(k_p), k_h / torch.linalg.matrix_norm(k_h)
    product = k_p @ k_h
    norm = float(torch.linalg.matrix_norm(product))
    commutator = float(torch.linalg.matrix_norm(product - product.T)) / (2 * norm) if norm > 0 else 0.0
    return float((k_p * k_h).sum()), commutator


def eigenvector_overlaps(primary: MomentFactor, harmful: MomentFactor) -> Tensor:
    """cos² of the angles between eigenvectors of K_P (rows) and K_H (columns), both by descending eigenvalue.

    These are the relative angles of Prop. 3.2: λ_j of one moment enters θᵀKθ weighted by them. The identity matrix
    means shared eigenvectors. Repeated eigenvalues make single entries arbitrary, sums over their block are not.
    """
    return (primary.right_DR.T @ harmful.right_DR).square()


def _verdict(ratio: float, cosine: float, commutator: float, pencil: CommonPencil) -> tuple[bool, str]:
    """Whether immunization is worth trying, and why."""
    if ratio >= WORTHWHILE:
        return True, f"some extractor multiplies the harmful-to-primary conditioning ratio by up to {ratio:.4g}."
    if pencil.values_C.shape[0] == 1:
        return False, "the tasks share a single direction: one eigenvalue has condition number 1 whatever is done."
    if pencil.condition_number < WORTHWHILE:
        return False, (
            f"the covariances are aligned (proportional on their common range, cosine {cosine:.6f}): every extractor "
            "conditions both tasks alike."
        )
    kind = "share all eigenvectors" if commutator < 1e-6 else "are arranged so"
    return False, (
        f"the covariances {kind} and the raw features already have the largest possible gap: no extractor improves "
        f"the ratio by more than a factor {ratio:.4g}."
    )
