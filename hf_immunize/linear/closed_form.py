"""The extractor that reaches the limit: one generalized eigenproblem, any point of the Pareto frontier."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_immunize.errors import ConfigError, ModelError
from hf_immunize.linalg.factor import MomentFactor
from hf_immunize.linalg.pencil import CommonPencil
from hf_immunize.linalg.spectrum import to_double


@dataclass(frozen=True)
class HeadThroughTheta:
    """A trained head rewritten for features φθ, with the agreement that was measured."""

    theta_DD: Tensor
    weight_CD: Tensor
    """θ⁻¹W in nn.Linear layout: logits = (φθ) @ weight_CD.T + old bias."""
    difference: float
    """max |new − old| logits over max |old| logits on the rows that were checked."""


def closed_form_theta(primary: MomentFactor, pencil: CommonPencil, budget: float) -> Tensor:
    """θ (D×D, invertible) with κ(H_P) = budget and κ(H_H) = κ*·budget, exactly (docs/condition-number-limits.md).

    θ = [B·d, N_P·s, N_H·s', N_O]: B from the pencil, d² ordered like μ with d²_max/d²_min = budget (log-linear in
    log μ). Task-only directions get scales inside the spectrum they belong to, so that they never decide a condition
    number: primary-only ones the middle of it, harmful-only ones the low end, because whatever rounding noise the
    primary rows have there is amplified with it. Scaled to tr H_P = tr K_P.

    Args:
        primary: factor of K_P.
        pencil: ``common_pencil`` of both tasks.
        budget: κ(H_P) to spend, 1 … κ(K_P). 1 conditions the primary task perfectly; κ(K_P) makes the harmful task as
            hard as Def. 3.1(b) allows. κ(H_H)/κ(H_P) is κ* at every budget.

    Raises:
        ConfigError: a budget outside [1, κ(K_P)].
    """
    ceiling = primary.condition_number
    if not 1 <= budget <= ceiling * (1 + 1e-9):
        raise ConfigError(
            f"expected a budget for the primary condition number between 1 and that of the raw features "
            f"({ceiling:.6g}), got {budget}: Def. 3.1(b) does not allow a worse primary task."
        )
    mu = pencil.values_C
    squares = _profile(mu, budget)
    middle_p = math.sqrt(float(squares[0] * squares[-1]))
    low_h = float((squares * mu)[-1])
    theta = torch.cat(
        [
            pencil.common_DC * squares.sqrt(),
            pencil.primary_only_DP * math.sqrt(middle_p),
            pencil.harmful_only_DH * math.sqrt(low_h),
            pencil.neither_DO,
        ],
        dim=1,
    )
    energy = float(squares.sum()) + middle_p * pencil.primary_only_DP.shape[1]
    return theta * math.sqrt(float(primary.sigma_R.square().sum()) / energy)


def _profile(mu_C: Tensor, budget: float) -> Tensor:
    """d², ordered like μ, with largest/smallest = budget."""
    spread = math.log(float(mu_C[0] / mu_C[-1]))
    if mu_C.shape[0] == 1:
        return torch.ones_like(mu_C)
    if spread > 1e-6:
        position = (mu_C.log() - mu_C[-1].log()) / spread
    else:  # aligned covariances: every order is an order of μ
        position = torch.linspace(1, 0, mu_C.shape[0], dtype=mu_C.dtype)
    return torch.exp(math.log(budget) * position.clamp(0, 1))


def preserve_function(
    theta_DD: Tensor, weight_CD: Tensor, features_ND: Tensor, *, tolerance: float = 1e-8
) -> HeadThroughTheta:
    """Rewrite a trained linear head for features φθ so that its outputs stay as they were: W → θ⁻¹W.

    Args:
        theta_DD: invertible extractor, D_in×D_out.
        weight_CD: head weight in nn.Linear layout (classes × features).
        features_ND: rows φ on which old and new outputs are compared.
        tolerance: allowed max |new − old| relative to max |old|; computed in float64.

    Raises:
        ModelError: shapes that do not fit, a singular θ, or outputs that differ by more than ``tolerance``.
    """
    theta, weight, features = (to_double(t.detach()) for t in (theta_DD, weight_CD, features_ND))
    width = theta.shape[0]
    if theta.shape != (width, width) or weight.shape[-1] != width or features.shape[-1] != width:
        raise ModelError(
            f"expected a square theta as wide as head and features, got {tuple(theta.shape)}, {tuple(weight.shape)} "
            f"and {tuple(features.shape)}: pass the head's weight as classes x features."
        )
    solution, info = torch.linalg.solve_ex(theta, weight.T)
    if int(info) != 0 or not bool(torch.isfinite(solution).all()):
        raise ModelError(
            "expected an invertible theta, got a singular one: outputs cannot be preserved through a projection; "
            "use closed_form, whose theta is invertible."
        )
    old, new = features @ weight.T, (features @ theta) @ solution
    largest = float(old.abs().max())
    difference = float((new - old).abs().max()) / (largest if largest > 0 else 1.0)
    if not difference <= tolerance:
        raise ModelError(
            f"expected outputs to agree to {tolerance:.3g} of the largest, got {difference:.3g}: theta is too "
            "ill-conditioned for this head; raise the rank tolerance or refit the head."
        )
    return HeadThroughTheta(theta, solution.T, difference)
