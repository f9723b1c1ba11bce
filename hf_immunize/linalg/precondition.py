"""An identity layer whose backward applies K⁻¹, so that one backward pass takes the step of Algorithm 1.

Shape legend: N rows, D input width, E output width of the layer, R = rank of K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg.factor import MomentFactor, factor_features, factor_moment


@dataclass(frozen=True)
class InverseMoment:
    """K⁻¹ as V diag(w) Vᵀ + w₀(I − VVᵀ): a pseudo-inverse (w₀ = 0) or a ridge inverse (K + λI)⁻¹ (w₀ = 1/λ)."""

    right_DR: Tensor
    weights_R: Tensor
    outside: float
    """Weight of the null space of K."""
    ridge: float
    """λ; 0 for the pseudo-inverse."""

    @classmethod
    def of(cls, factor: MomentFactor, *, ridge: float = 0.0, scale: float = 1.0) -> InverseMoment:
        """Inverse of scale·K + ridge·I; with ridge = 0 the pseudo-inverse of scale·K.

        ``scale`` = 1/N turns XᵀX into the second moment of which the regularizers are functions.

        Raises:
            SpectrumError: a negative ridge or a scale that is not positive.
        """
        if not (ridge >= 0 and scale > 0):
            raise SpectrumError(f"expected ridge >= 0 and scale > 0, got {ridge} and {scale}.")
        weights = (scale * factor.sigma_R.square() + ridge).reciprocal()
        return cls(factor.right_DR, weights, 1 / ridge if ridge > 0 else 0.0, ridge)

    @classmethod
    def of_features(
        cls, features_ND: Tensor, *, ridge: float = 0.0, tolerance: float | None = None
    ) -> InverseMoment:
        """Inverse of XᵀX/N + ridge·I from the rows, as for the batch that enters a layer."""
        return cls.of(factor_features(features_ND, tolerance=tolerance), ridge=ridge, scale=1 / features_ND.shape[0])

    @classmethod
    def of_moment(cls, moment_DD: Tensor, *, ridge: float = 0.0, tolerance: float | None = None) -> InverseMoment:
        """Inverse of K + ridge·I from K itself."""
        return cls.of(factor_moment(moment_DD, tolerance=tolerance), ridge=ridge)

    def apply(self, gradient: Tensor) -> Tensor:
        """K⁻¹ @ gradient for a D×E gradient, solved in float64, returned in the gradient's dtype and device.

        Raises:
            SpectrumError: a gradient whose first dimension is not D.
        """
        if gradient.dim() != 2 or gradient.shape[0] != self.right_DR.shape[0]:
            raise SpectrumError(
                f"expected a gradient with {self.right_DR.shape[0]} rows, got shape {tuple(gradient.shape)}: the "
                "inverse acts on the input side; for an nn.Linear weight use precondition(..., weight_layout=True)."
            )
        right = self.right_DR
        wide = gradient.to(device=right.device, dtype=right.dtype)
        inside = right.T @ wide
        # w₀G + V(w − w₀)VᵀG, so that a full-rank K and a ridge need one formula.
        out = right @ ((self.weights_R - self.outside)[:, None] * inside) + self.outside * wide
        return out.to(gradient)


class _Precondition(torch.autograd.Function):
    """Identity forward; K⁻¹ @ grad (θ layout, D×E) or grad @ K⁻¹ (nn.Linear layout, E×D) backward."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, inverse: InverseMoment, weight_layout: bool) -> Tensor:
        ctx.inverse, ctx.weight_layout = inverse, weight_layout
        return theta.view_as(theta)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.weight_layout:
            return ctx.inverse.apply(gradient.T).T, None, None
        return ctx.inverse.apply(gradient), None, None


def precondition(theta: Tensor, inverse: InverseMoment, *, weight_layout: bool = False) -> Tensor:
    """θ unchanged; its gradient becomes K⁻¹∇_θ (Zheng et al. 2025, Algorithm 1: K⁻¹ on the *input* side).

    Args:
        theta: D×E extractor, used as x @ θ; with ``weight_layout`` an E×D nn.Linear weight, used as x @ Wᵀ.
        inverse: K⁻¹ of the D-wide inputs. Use one call per regularizer, each with its own K.
        weight_layout: the gradient is multiplied from the right, grad_weight @ K⁻¹.

    Raises:
        SpectrumError: the input side of ``theta`` is not as wide as K.
    """
    width = theta.shape[1] if weight_layout and theta.dim() == 2 else theta.shape[0]
    if theta.dim() != 2 or width != inverse.right_DR.shape[0]:
        raise SpectrumError(
            f"expected an input side of width {inverse.right_DR.shape[0]}, got shape {tuple(theta.shape)} with "
            f"weight_layout={weight_layout}: theta is D_in x D_out, an nn.Linear weight is D_out x D_in."
        )
    result: Tensor = _Precondition.apply(theta, inverse, weight_layout)  # type: ignore[no-untyped-call]
    return result


def preconditioned_linear(
    inputs_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None, inverse: InverseMoment | None = None
) -> Tensor:
    """``torch.nn.functional.linear`` whose weight gradient is grad @ K⁻¹; inputs and bias get plain gradients.

    For a deep trainer: recompute the features that a regularizer sees with this in place of the last linear layer, and
    leave the layer itself as it is for the primary loss. Without ``inverse``, K is the second moment of ``inputs_ND``.
    """
    inverse = inverse or InverseMoment.of_features(inputs_ND)
    return torch.nn.functional.linear(inputs_ND, precondition(weight_ED, inverse, weight_layout=True), bias_E)
