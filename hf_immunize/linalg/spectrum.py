"""Extreme eigenvalues and condition number of a feature second moment, rank-aware and differentiable.

Shape legend: N rows (samples), D columns (feature width), S = min(N, D) the smaller side; ``...`` any number of
matrices of one shape (a stack), whose decompositions are one call.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg.converging import converging


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
    """Spectrum of the second moment M = ΦᵀΦ / N of features Φ (N×D), in float64; or of every matrix of a stack.

    ``largest``, ``smallest`` (smallest *nonzero*) and ``frobenius_squared`` = ‖M‖_F² are zero-dimensional float64
    tensors that carry gradients to Φ; ``rank`` is a zero-dimensional int64 tensor. Of a stack (``...``×N×D) all of them
    have the shape ``...``. Nothing here synchronises the device until ``status`` or a Python number is asked for, but
    for torch's own check that its decomposition succeeded.
    """

    largest: Tensor
    smallest: Tensor
    frobenius_squared: Tensor
    rank: Tensor
    eigenvalues: Tensor
    """All S eigenvalues of M, descending, detached; those past ``rank`` are below the noise of the features."""
    rows: int
    width: int

    def unbind(self, dim: int = 0) -> list[Spectrum]:
        """Spectra of a stack's parts along ``dim``, which may not be the eigenvalues' own (counted from the left)."""
        several = (self.largest, self.smallest, self.frobenius_squared, self.rank, self.eigenvalues)
        return [
            Spectrum(largest, smallest, frobenius, rank, eigenvalues, self.rows, self.width)
            for largest, smallest, frobenius, rank, eigenvalues in zip(*(v.unbind(dim) for v in several), strict=True)
        ]

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
        noise = 2 * self.eigenvalues.shape[-1] * torch.finfo(largest.dtype).eps * largest.square()
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
        share = self.eigenvalues.clamp(min=0) / self.eigenvalues.sum(dim=-1, keepdim=True)
        entropy: Tensor = torch.special.entr(share).sum(dim=-1)
        return entropy.exp()


_HALF = (torch.bfloat16, torch.float16)


def check_features(features_ND: Tensor, *, stacked: bool = False) -> None:
    """Raise SpectrumError unless ``features_ND`` is a floating N×D matrix with N, D ≥ 1. Does not read values.

    With ``stacked``, matrices of one shape behind any number of dimensions will do too.
    """
    shaped = features_ND.dim() >= 2 if stacked else features_ND.dim() == 2
    if not shaped or min(features_ND.shape) < 1 or not features_ND.is_floating_point():
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


def moment_floor(values_S: Tensor, mean_squared: Tensor, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """``singular_value_floor`` from the descending eigenvalues of centred features' M and the mean's square norm."""
    largest = (values_S[..., 0] + mean_squared).sqrt()
    return singular_value_floor(largest, (values_S.sum(dim=-1) + mean_squared).sqrt(), rows, width, dtype)


class _ExtremeEigenvalues(torch.autograd.Function):
    """λ₁, λ_k and ‖H‖_F² of H = ΦᵀΦ with closed-form gradients 2Φv₁v₁ᵀ, 2Φv_kv_kᵀ and 4ΦH.

    Only the two extreme eigenvectors of the smaller Gram matrix are kept, so that nothing divides by a gap between
    eigenvalues: at a repeated eigenvalue one member of its subgradient is returned, always finite.
    """

    @staticmethod
    def forward(
        ctx: Any, phi: Tensor, mean_squared: Tensor, dtype: torch.dtype, by_svd: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        rows, width = phi.shape[-2:]
        wide = rows <= width
        # LAPACK refuses NaN; zeros keep the call alive and NaN eigenvalues carry the news without a device sync.
        finite = torch.isfinite(phi).flatten(-2).all(dim=-1)
        safe = torch.where(finite[..., None, None], phi, torch.zeros_like(phi))
        gram_SS = safe @ safe.mT if wide else safe.mT @ safe
        if by_svd:
            left, sigma, right = torch.linalg.svd(safe, full_matrices=False)
            values, vectors = sigma.square(), left if wide else right.mH
        else:
            values, vectors = torch.linalg.eigh(gram_SS)
            values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
        largest = values[..., 0]
        floor = moment_floor(values, mean_squared, rows, width, dtype)
        if not by_svd:
            # Squaring loses half the digits: eigenvalues below S·eps64·λ₁ are rounding of the Gram matrix itself.
            floor = torch.maximum(floor, (values.shape[-1] * torch.finfo(values.dtype).eps * largest).sqrt())
        rank = (values.sqrt() > floor[..., None]).sum(dim=-1)
        last = (rank - 1).clamp(min=0)[..., None]
        # gather: values[last] would read the index, and wait for the device.
        smallest = torch.where(rank > 0, values.gather(-1, last).squeeze(-1), torch.zeros_like(largest))
        bad = torch.full_like(values, float("nan"))
        values = torch.where(finite[..., None], values, bad)
        smallest = torch.where(finite, smallest, bad[..., 0])
        last_column = last[..., None].expand(*vectors.shape[:-1], 1)
        ctx.save_for_backward(safe, gram_SS, vectors[..., :1], vectors.gather(-1, last_column))
        ctx.wide = wide
        ctx.mark_non_differentiable(rank, values)
        return values[..., 0].clone(), smallest, values.square().sum(dim=-1), rank, values

    @staticmethod
    def backward(ctx: Any, d_largest: Tensor, d_smallest: Tensor, d_frobenius: Tensor, *_: Any) -> tuple[Any, ...]:
        phi, gram_SS, first, last = ctx.saved_tensors
        d_largest, d_smallest, d_frobenius = (d[..., None, None] for d in (d_largest, d_smallest, d_frobenius))
        weight_SS = (
            2 * d_largest * (first @ first.mT) + 2 * d_smallest * (last @ last.mT) + 4 * d_frobenius * gram_SS
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
    return second_moment_spectra(features_ND, centered=centered, method=method, feature_dtype=feature_dtype)


@converging()
def second_moment_spectra(
    features_GND: Tensor, *, centered: bool = True, method: str = "auto", feature_dtype: torch.dtype | None = None
) -> Spectrum:
    """``second_moment_spectrum`` of every matrix of a stack ``...``×N×D, by one decomposition call for all.

    Each matrix has its own floor, rank and finiteness, and its values and gradients do not depend on its neighbours.
    Arguments are those of ``second_moment_spectrum``.

    Raises:
        SpectrumError: not floating ``...``×N×D, or an unknown method.
        DecompositionError: features that are finite, but so large that their squares are not.
    """
    check_features(features_GND, stacked=True)
    dtype = feature_dtype or features_GND.dtype
    if method not in ("auto", "svd", "gram"):
        raise SpectrumError(f"expected method 'auto', 'svd' or 'gram', got {method!r}.")
    by_svd = method == "svd" or (method == "auto" and dtype == torch.float64)
    rows, width = features_GND.shape[-2:]
    phi = to_double(features_GND) / math.sqrt(rows)
    mean_squared = phi.new_zeros(phi.shape[:-2])
    if centered:
        mean_G1D = phi.mean(dim=-2, keepdim=True)
        phi, mean_squared = phi - mean_G1D, rows * mean_G1D.detach().square().sum(dim=(-2, -1))
    outputs = _ExtremeEigenvalues.apply(phi, mean_squared, dtype, by_svd)  # type: ignore[no-untyped-call]
    largest, smallest, frobenius_squared, rank, values = outputs
    return Spectrum(largest, smallest, frobenius_squared, rank, values, rows, width)
