"""Extreme eigenvalues and condition number of a feature second moment, rank-aware and differentiable.

Shape legend: N rows (samples), D columns (feature width), S = min(N, D) the smaller side.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_immunize.errors import SpectrumError


class SpectrumStatus(enum.StrEnum):
    """Health of a spectrum; ``advice`` says what to do about it."""

    OK = "ok"
    RANK_DEFICIENT = "rank_deficient"
    ZERO = "zero"
    NOT_FINITE = "not_finite"

    @property
    def advice(self) -> str:
        """One sentence on what this status means for the reader of the number."""
        return {
            SpectrumStatus.OK: "full numerical rank: the condition number is over the whole spectrum.",
            SpectrumStatus.RANK_DEFICIENT: "numerical rank below the feature width: the condition number is over the "
            "nonzero spectrum; use more rows than features to see the rest.",
            SpectrumStatus.ZERO: "no nonzero singular value: features are constant, or one row was centred; use at "
            "least two different rows.",
            SpectrumStatus.NOT_FINITE: "features contain NaN or infinity: check the images, the learning rate and "
            "the mixed-precision setting.",
        }[self]


@dataclass(frozen=True)
class Spectrum:
    """Spectrum of the second moment M = ΦᵀΦ / N of features Φ (N×D), in float64.

    ``largest``, ``smallest`` (smallest *nonzero*) and ``frobenius_squared`` = ‖M‖_F² are zero-dimensional float64
    tensors that carry gradients to Φ; ``rank`` is a zero-dimensional int64 tensor. Nothing here synchronises the
    device until ``status`` or a Python number is asked for, but for torch's own check that its decomposition succeeded.
    """

    largest: Tensor
    smallest: Tensor
    frobenius_squared: Tensor
    rank: Tensor
    eigenvalues: Tensor
    """All S eigenvalues of M, descending, detached; those past ``rank`` are below the noise of the features."""
    rows: int
    width: int

    @property
    def log_condition(self) -> Tensor:
        """log κ(M) = log λ_max − log λ_min over the nonzero spectrum; NaN when the spectrum is zero or not finite."""
        return torch.log(self.largest) - torch.log(self.smallest)

    @property
    def ill_gap(self) -> Tensor:
        """Q = ‖M‖_F²/(2k) − ½λ_k², k the rank: 0 where all eigenvalues are equal, positive elsewhere.

        Q below its own rounding is 0, without a gradient: which side of 0 it falls on is not the features' doing. The
        decomposition leaves S·eps·λ₁ on every eigenvalue (S of them), so 2·S·eps·λ₁² on Q.
        """
        gap = self.frobenius_squared / (2 * self.rank) - 0.5 * self.smallest.square()
        largest = self.largest.detach()
        noise = 2 * len(self.eigenvalues) * torch.finfo(largest.dtype).eps * largest.square()
        return torch.where(gap.abs() <= noise, torch.zeros_like(gap), gap)

    @property
    def status(self) -> SpectrumStatus:
        """Health of the numbers (reads the device once)."""
        if not bool(torch.isfinite(self.eigenvalues).all()):
            return SpectrumStatus.NOT_FINITE
        rank = int(self.rank)
        if rank == 0:
            return SpectrumStatus.ZERO
        return SpectrumStatus.OK if rank == self.width else SpectrumStatus.RANK_DEFICIENT

    @property
    def condition_number(self) -> float:
        """κ(M) over the nonzero spectrum as a Python float. Raises SpectrumError if it is not defined."""
        status = self.status
        if status in (SpectrumStatus.ZERO, SpectrumStatus.NOT_FINITE):
            raise SpectrumError(
                f"expected features of at least rank one, got a {self.rows}x{self.width} matrix with status "
                f"{status.value}: {status.advice}"
            )
        return float(self.largest / self.smallest)

    @property
    def effective_rank(self) -> Tensor:
        """exp of the entropy of the normalised eigenvalues (Roy & Vetterli 2007); between 1 and ``rank``."""
        share = self.eigenvalues.clamp(min=0) / self.eigenvalues.sum()
        entropy: Tensor = torch.special.entr(share).sum()
        return entropy.exp()


_HALF = (torch.bfloat16, torch.float16)


def check_features(features_ND: Tensor) -> None:
    """Raise SpectrumError unless ``features_ND`` is a floating N×D matrix with N, D ≥ 1. Does not read values."""
    if features_ND.dim() != 2 or min(features_ND.shape) < 1 or not features_ND.is_floating_point():
        raise SpectrumError(
            f"expected a floating-point N x D matrix with at least one row and one column, got shape "
            f"{tuple(features_ND.shape)} of {features_ND.dtype}: pool the features to one row per sample first."
        )


def to_double(features_ND: Tensor) -> Tensor:
    """float64 copy of the features, on the CPU where the device (MPS) has no float64; differentiable."""
    if features_ND.device.type == "mps":
        features_ND = features_ND.cpu()
    return features_ND.double()


def singular_value_floor(sigma_max: Tensor, frobenius: Tensor, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Size below which a singular value of features computed in ``dtype`` is rounding noise.

    ``sigma_max`` and ``frobenius`` are those of the features *before* centring: rounding follows their size.

    max(N, D)·eps·σ₁ with eps of the arithmetic (float32 for half-precision features, whose accumulators are
    float32), plus, for bfloat16 and float16, the Frobenius norm of the storage rounding, ½·eps(dtype)·‖Φ‖_F: a bound
    on the spectral norm of that perturbation. See docs/method.md, section 1.
    """
    arithmetic = torch.float32 if dtype in _HALF else dtype
    floor = max(rows, width) * torch.finfo(arithmetic).eps * sigma_max
    if dtype in _HALF:
        floor = floor + 0.5 * torch.finfo(dtype).eps * frobenius
    return floor


class _ExtremeEigenvalues(torch.autograd.Function):
    """λ₁, λ_k and ‖H‖_F² of H = ΦᵀΦ with closed-form gradients 2Φv₁v₁ᵀ, 2Φv_kv_kᵀ and 4ΦH.

    Only the two extreme eigenvectors of the smaller Gram matrix are kept, so that nothing divides by a gap between
    eigenvalues: at a repeated eigenvalue one member of its subgradient is returned, always finite.
    """

    @staticmethod
    def forward(
        ctx: Any, phi: Tensor, mean_squared: Tensor, dtype: torch.dtype, by_svd: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        rows, width = phi.shape
        wide = rows <= width
        # LAPACK refuses NaN; zeros keep the call alive and NaN eigenvalues carry the news without a device sync.
        finite = torch.isfinite(phi).all()
        safe = torch.where(finite, phi, torch.zeros_like(phi))
        gram_SS = safe @ safe.T if wide else safe.T @ safe
        if by_svd:
            left, sigma, right = torch.linalg.svd(safe, full_matrices=False)
            values, vectors = sigma.square(), left if wide else right.mH
        else:
            values, vectors = torch.linalg.eigh(gram_SS)
            values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        raw_sigma_max = (values[0] + mean_squared).sqrt()
        floor = singular_value_floor(raw_sigma_max, (values.sum() + mean_squared).sqrt(), rows, width, dtype)
        if not by_svd:
            # Squaring loses half the digits: eigenvalues below S·eps64·λ₁ are rounding of the Gram matrix itself.
            floor = torch.maximum(floor, (len(values) * torch.finfo(values.dtype).eps * values[0]).sqrt())
        rank = (values.sqrt() > floor).sum()
        last = (rank - 1).clamp(min=0).reshape(1)
        # index_select: values[last] would read the index, and wait for the device.
        smallest = torch.where(rank > 0, values.index_select(0, last).squeeze(0), torch.zeros_like(values[0]))
        bad = torch.full_like(values, float("nan"))
        values = torch.where(finite, values, bad)
        smallest = torch.where(finite, smallest, bad[0])
        ctx.save_for_backward(safe, gram_SS, vectors[:, 0], vectors.index_select(1, last).squeeze(1))
        ctx.wide = wide
        ctx.mark_non_differentiable(rank, values)
        return values[0].clone(), smallest, values.square().sum(), rank, values

    @staticmethod
    def backward(ctx: Any, d_largest: Tensor, d_smallest: Tensor, d_frobenius: Tensor, *_: Any) -> tuple[Any, ...]:
        phi, gram_SS, first, last = ctx.saved_tensors
        weight_SS = (
            2 * d_largest * torch.outer(first, first)
            + 2 * d_smallest * torch.outer(last, last)
            + 4 * d_frobenius * gram_SS
        )
        return (weight_SS @ phi if ctx.wide else phi @ weight_SS), None, None, None


def second_moment_spectrum(
    features_ND: Tensor, *, centered: bool = True, method: str = "auto", feature_dtype: torch.dtype | None = None
) -> Spectrum:
    """Spectrum of M = ΦᵀΦ/N, rank-aware, in float64 whatever comes in.

    κ(M) is the Hessian condition number of ℓ2 linear probing (Zheng et al. 2025, section 3); dividing by N leaves κ
    unchanged and makes the other quantities independent of the batch size.

    Args:
        features_ND: N×D features of any floating dtype.
        centered: subtract column means first (the attacker has a bias).
        method: ``"svd"``, or ``"gram"``: an eigen-decomposition of the smaller of the N×N and D×D Gram matrices.
            Forming that in float64 perturbs the smallest eigenvalue by less than float32 features are worth, so
            ``"auto"`` takes ``"gram"`` for float32 and narrower and ``"svd"`` for float64.
        feature_dtype: dtype the features were *computed* in, if they have since been cast; it sets the rank floor.

    Raises:
        SpectrumError: not a floating N×D matrix with at least one row and column, or an unknown method.
    """
    check_features(features_ND)
    dtype = feature_dtype or features_ND.dtype
    if method not in ("auto", "svd", "gram"):
        raise SpectrumError(f"expected method 'auto', 'svd' or 'gram', got {method!r}.")
    by_svd = method == "svd" or (method == "auto" and dtype == torch.float64)
    rows, width = features_ND.shape
    phi = to_double(features_ND) / math.sqrt(rows)
    mean_squared = phi.new_zeros(())
    if centered:
        mean_1D = phi.mean(dim=0, keepdim=True)
        phi, mean_squared = phi - mean_1D, rows * mean_1D.detach().square().sum()
    outputs = _ExtremeEigenvalues.apply(phi, mean_squared, dtype, by_svd)  # type: ignore[no-untyped-call]
    largest, smallest, frobenius_squared, rank, values = outputs
    return Spectrum(largest, smallest, frobenius_squared, rank, values, rows, width)
