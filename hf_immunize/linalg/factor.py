"""A second moment K = XᵀX kept as singular values and right vectors of X: ranks and ranges with a stated tolerance.

Shape legend: N rows, D columns (input width), R = rank, Z = D − R, E columns of an extractor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg.converging import converging
from hf_immunize.linalg.spectrum import check_features, singular_value_floor, to_double


@dataclass(frozen=True)
class MomentFactor:
    """K = V diag(σ²) Vᵀ with orthonormal V (D×R); everything float64 and detached.

    Working with σ of X instead of σ² of K keeps twice as many digits of an ill-conditioned task.
    """

    sigma_R: Tensor
    """Singular values of X above the tolerance, descending, positive."""
    right_DR: Tensor
    null_DZ: Tensor
    """Orthonormal basis of the null space of K."""
    tolerance: float
    """Singular values at or below tolerance·σ₁ count as zero."""
    dropped: float
    """Largest singular value that was counted as zero, relative to σ₁ (0 if there is none): far below
    ``tolerance`` means that the rank does not depend on the choice of tolerance."""
    null_error: float
    """Angle (radians, to first order) by which rounding of the input may have tilted ``null_DZ``: 8·eps·σ₁/σ_R for
    rows, 8·eps·(σ₁/σ_R)² for a given K."""

    @property
    def width(self) -> int:
        """D."""
        return self.right_DR.shape[0]

    @property
    def rank(self) -> int:
        """Numerical rank at ``tolerance``."""
        return self.sigma_R.shape[0]

    @property
    def condition_number(self) -> float:
        """κ(K) = (σ₁/σ_R)² over the nonzero spectrum."""
        return float((self.sigma_R[0] / self.sigma_R[-1]).square())

    @property
    def factor_RD(self) -> Tensor:
        """F = diag(σ)Vᵀ, full row rank, with FᵀF = K."""
        return self.sigma_R[:, None] * self.right_DR.T

    @property
    def moment_DD(self) -> Tensor:
        """K itself."""
        return self.factor_RD.T @ self.factor_RD

    def through(self, theta_DE: Tensor, *, tolerance: float | None = None) -> MomentFactor:
        """Factor of H = θᵀKθ, from the singular values of Fθ: K is never formed.

        Raises:
            SpectrumError: widths that do not fit, θ that is not finite, or H = 0.
        """
        check_features(theta_DE)
        if theta_DE.shape[0] != self.width:
            raise SpectrumError(
                f"expected an extractor with {self.width} input rows, got shape {tuple(theta_DE.shape)}: theta is "
                "D_in x D_out; transpose an nn.Linear weight."
            )
        return factor_features(self.factor_RD @ to_double(theta_DE.detach()), tolerance=tolerance)


@converging()
def factor_features(
    features_ND: Tensor,
    *,
    tolerance: float | None = None,
    feature_dtype: torch.dtype | None = None,
    rows: int | None = None,
) -> MomentFactor:
    """Factor of K = XᵀX from the rows X themselves (not centred, not divided by N).

    Args:
        features_ND: N×D rows of any floating dtype.
        tolerance: singular values at or below tolerance·σ₁ are zero. Default: max(N, D)·eps of ``feature_dtype``.
        feature_dtype: dtype the rows were *computed* in, if they have since been cast.
        rows: N of the original rows, if ``features_ND`` is their triangular factor.

    Raises:
        SpectrumError: not a finite floating N×D matrix, all zero, or a tolerance outside [0, 1).
    """
    check_features(features_ND)
    triangle = _triangle(features_ND)
    _, sigma, right_t = torch.linalg.svd(triangle, full_matrices=True)
    tolerance = _feature_tolerance(sigma, features_ND, tolerance, feature_dtype, rows)
    return _cut(sigma, right_t.T, tolerance, eps=torch.finfo(feature_dtype or features_ND.dtype).eps, power=1)


@converging()
def feature_singular_values(
    features_ND: Tensor, *, tolerance: float | None = None, feature_dtype: torch.dtype | None = None
) -> tuple[Tensor, float]:
    """(all min(N, D) singular values of X in float64, descending; the relative tolerance below which they are zero).

    What ``factor_features`` decides a rank from, without the vectors. Raises the same SpectrumErrors.
    """
    check_features(features_ND)
    sigma = torch.linalg.svdvals(_triangle(features_ND))
    return sigma, _feature_tolerance(sigma, features_ND, tolerance, feature_dtype, None)


def _triangle(features_ND: Tensor) -> Tensor:
    """X in float64, or R of X = QR when there are more rows than columns."""
    wide = to_double(features_ND.detach())
    if not bool(torch.isfinite(wide).all()):
        raise SpectrumError("expected finite features, got NaN or infinity: clean the rows first.")
    triangle: Tensor = torch.linalg.qr(wide, mode="r")[1] if wide.shape[0] > wide.shape[1] else wide
    return triangle


def _feature_tolerance(
    sigma: Tensor, features_ND: Tensor, given: float | None, dtype: torch.dtype | None, rows: int | None
) -> float:
    """The given relative tolerance, or max(N, D)·eps and storage rounding; refuses an all-zero spectrum."""
    if not bool(sigma[0] > 0):
        raise SpectrumError("expected features with at least one nonzero value, got a zero matrix.")
    _check_tolerance(given)
    if given is not None:
        return given
    count, width = features_ND.shape
    frobenius = torch.linalg.vector_norm(sigma)
    return float(singular_value_floor(sigma[0], frobenius, rows or count, width, dtype or features_ND.dtype) / sigma[0])


@converging()
def factor_moment(moment_DD: Tensor, *, tolerance: float | None = None) -> MomentFactor:
    """Factor of a given symmetric positive semidefinite K.

    A formed Gram matrix knows its small eigenvalues only to D·eps·λ₁, so the default tolerance on singular values is
    √(D·eps) (4e-7 at D = 784 in float64): condition numbers above 1e13 need ``factor_features``.

    Args:
        moment_DD: K, symmetric to √eps·max|K| of its dtype.
        tolerance: on *singular values of X*, that is the square root of an eigenvalue ratio of K.

    Raises:
        SpectrumError: K that is not square, finite, symmetric, positive semidefinite and nonzero, or a bad tolerance.
    """
    check_features(moment_DD)
    _check_tolerance(tolerance)
    if moment_DD.shape[0] != moment_DD.shape[1]:
        raise SpectrumError(
            f"expected a square D x D second moment, got shape {tuple(moment_DD.shape)}: for N x D rows use "
            "factor_features."
        )
    moment = to_double(moment_DD.detach())
    if not bool(torch.isfinite(moment).all()):
        raise SpectrumError("expected a finite second moment, got NaN or infinity: clean the rows first.")
    largest, eps = float(moment.abs().max()), torch.finfo(moment_DD.dtype).eps
    _check_symmetry(moment, eps**0.5 * largest)
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    if not bool(values.abs().max() > 0):
        raise SpectrumError("expected a nonzero second moment, got a zero matrix.")
    noise = moment.shape[0] * eps * float(values.abs().max())
    if float(values[-1]) < -max(noise, eps**0.5 * largest):
        raise SpectrumError(
            f"expected a positive semidefinite second moment, got an eigenvalue of {float(values[-1]):.3g}: it is no "
            "X^T X."
        )
    floor = (noise / float(values[0])) ** 0.5 if tolerance is None else tolerance
    return _cut(values.clamp(min=0).sqrt(), vectors, floor, eps=eps, power=2)


def _check_symmetry(moment: Tensor, allowed: float) -> None:
    skew = float((moment - moment.T).abs().max())
    if skew > allowed:
        raise SpectrumError(
            f"expected a symmetric second moment, got |K - K^T| up to {skew:.3g} where {allowed:.3g} is rounding: pass "
            "X.T @ X, or (K + K.T) / 2 if you know that the difference means nothing."
        )


def _check_tolerance(tolerance: float | None) -> None:
    if tolerance is not None and not 0 <= tolerance < 1:
        raise SpectrumError(f"expected a relative tolerance in [0, 1), got {tolerance}.")


def _cut(sigma: Tensor, right_DD: Tensor, tolerance: float, *, eps: float, power: int) -> MomentFactor:
    """Split singular values and right vectors at tolerance·σ₁."""
    rank = int((sigma > tolerance * sigma[0]).sum())
    dropped = float(sigma[rank] / sigma[0]) if rank < sigma.shape[0] else 0.0
    tilt = 8 * eps * float(sigma[0] / sigma[rank - 1]) ** power
    return MomentFactor(sigma[:rank], right_DD[:, :rank], right_DD[:, rank:], float(tolerance), dropped, tilt)
