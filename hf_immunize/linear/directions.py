"""Gradients of R_well, R_ill and log κ through H = θᵀKθ, with K⁻¹ on the input side or without it.

Each takes a factor F of K (R×D, full row rank, K = FᵀF) and an extractor θ (D×E), and never forms K or H: the
singular vectors come from Fθ. Scale: of XᵀX, not divided by rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Through:
    """Spectrum of H = θᵀKθ from the SVD of Fθ = U diag(s) Vᵀ, over the R directions K sees."""

    factor_RD: Tensor
    projector_RD: Tensor
    """Orthonormal rows that span range(K)."""
    theta_DE: Tensor
    sigma_R: Tensor
    right_ER: Tensor

    @classmethod
    def of(cls, factor_RD: Tensor, projector_RD: Tensor, theta_DE: Tensor) -> Through:
        """One SVD; directions that θ has sent below rounding (max(R, E)·eps·s₁) are dropped."""
        product = factor_RD @ theta_DE
        _, sigma, right_t = torch.linalg.svd(product, full_matrices=False)
        floor = max(product.shape) * torch.finfo(product.dtype).eps * sigma[0]
        rank = max(1, int((sigma > floor).sum()))
        return cls(factor_RD, projector_RD, theta_DE, sigma[:rank], right_t[:rank].T)

    @property
    def values_R(self) -> Tensor:
        """Nonzero eigenvalues of H, descending."""
        return self.sigma_R.square()

    @property
    def condition_number(self) -> float:
        """κ(H) over the nonzero spectrum."""
        return float(self.values_R[0] / self.values_R[-1])

    def chain(self, inner_EE: Tensor, *, preconditioned: bool) -> Tensor:
        """2Kθ·inner, or with K⁺ in front of it 2Πθ·inner, where Π projects onto range(K)."""
        if preconditioned:
            return 2 * self.projector_RD.T @ (self.projector_RD @ (self.theta_DE @ inner_EE))
        return 2 * self.factor_RD.T @ (self.factor_RD @ (self.theta_DE @ inner_EE))

    def combine(self, coefficients_R: Tensor) -> Tensor:
        """V diag(c) Vᵀ."""
        return (self.right_ER * coefficients_R) @ self.right_ER.T


def well_direction(at: Through, *, width: int, preconditioned: bool = True, cluster: float = 0.0) -> Tensor:
    """∇_θR_well(H) = 2Kθ(σ₁v₁v₁ᵀ − H/p), p = ``width``; K⁻¹ in front of it by default.

    R_well is not differentiable where σ₁ is repeated; with ``cluster`` c > 0 every eigenvalue within the factor 1 − c
    of σ₁ shares v₁'s place equally (the smallest subgradient if they are equal), so a step does not merely swap them.
    """
    values = at.values_R
    top = values >= values[0] * (1 - cluster)
    coefficients = torch.where(top, values / top.sum(), torch.zeros_like(values)) - values / width
    return at.chain(at.combine(coefficients), preconditioned=preconditioned)


def ill_direction(at: Through, *, preconditioned: bool = True) -> Tensor:
    """∇_θR_ill(H) = 2Kθ(σ_kv_kv_kᵀ − H/k)/Q², Q = ‖H‖_F²/(2k) − σ_k²/2, k the rank of H; K⁻¹ in front by default.

    Zero where H is perfectly conditioned (Q = 0 up to rounding): no direction is preferred there. The SVD leaves
    n·eps·s₁ on every singular value, n the larger side of Fθ, so 2n·eps·σ₁ on eigenvalues and 4n·eps·σ₁² on Q.
    """
    values = at.values_R
    k = values.shape[0]
    q = values.square().sum() / (2 * k) - values[-1].square() / 2
    side = max(at.factor_RD.shape[0], at.theta_DE.shape[1])
    if not bool(q > 4 * side * torch.finfo(q.dtype).eps * values[0].square()):
        return torch.zeros_like(at.theta_DE)
    coefficients = -values / k
    coefficients[-1] += values[-1]
    return at.chain(at.combine(coefficients), preconditioned=preconditioned) / q.square()


def log_condition_direction(at: Through) -> Tensor:
    """∇_θ log κ(H) = 2Kθ(v₁v₁ᵀ/σ₁ − v_kv_kᵀ/σ_k), the gradient of the "Opt κ" baseline; no K⁻¹."""
    coefficients = torch.zeros_like(at.values_R)
    coefficients[0] += 1 / at.values_R[0]
    coefficients[-1] -= 1 / at.values_R[-1]
    return at.chain(at.combine(coefficients), preconditioned=False)


def safe_well_step(values_R: Tensor, width: int) -> float:
    """Largest η with which θ − ηK⁻¹∇R_well keeps σ₁ at or above σ₂, so that κ cannot rise (Theorem 4.3(1), corrected).

    η = (√σ₁ − √σ₂) / (2[σ₁^{3/2}(1 − 1/p) + σ₂^{3/2}/p]).
    """
    first, second = math.sqrt(float(values_R[0])), math.sqrt(float(values_R[1]))
    return (first - second) / (2 * (first**3 * (1 - 1 / width) + second**3 / width))


def safe_ill_step(values_R: Tensor) -> float:
    """Upper end of the η with which θ − ηK⁻¹∇R_ill shrinks σ_k without passing zero: Q²/(2σ_k(1 − 1/k))."""
    k = values_R.shape[0]
    last = float(values_R[-1])
    q: float = float(values_R.square().sum()) / (2 * k) - last * last / 2
    return q * q / (2 * last * (1 - 1 / k))
