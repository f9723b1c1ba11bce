"""Closed-form ridge probe and its held-out R², differentiable in the features.

Shape legend: N rows (samples), D columns (feature width), C label columns; ``...`` a stack of matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg.converging import converging
from hf_immunize.linalg.spectrum import check_features, singular_value_floor, to_double


@converging()
def ridge_weights(phi_ND: Tensor, labels_NC: Tensor, penalty: Tensor) -> Tensor:
    """Minimiser W (D×C) of ‖ΦW − Y‖² + penalty·‖W‖², by a Cholesky solve on the smaller of the N×N and D×D sides.

    Inputs are float64 and already centred. ``penalty`` is a positive zero-dimensional tensor. For a stack ``...``×N×D
    there is a penalty for each (shape ``...``) and labels may be shared; W is ``...``×D×C.

    Raises:
        DecompositionError: features that are NaN, infinite or too large.
    """
    rows, width = phi_ND.shape[-2:]
    side = min(rows, width)
    shift = penalty[..., None, None] * torch.eye(side, dtype=phi_ND.dtype, device=phi_ND.device)
    if rows <= width:
        return phi_ND.mT @ torch.cholesky_solve(labels_NC, torch.linalg.cholesky(phi_ND @ phi_ND.mT + shift))
    return torch.cholesky_solve(phi_ND.mT @ labels_NC, torch.linalg.cholesky(phi_ND.mT @ phi_ND + shift))


def r_squared(residual_NC: Tensor, labels_NC: Tensor) -> Tensor:
    """1 − ‖residual‖²/‖Y‖² with Y centred by the support mean: 0 for a constant answer, 1 for a perfect one."""
    return 1 - residual_NC.square().sum(dim=(-2, -1)) / labels_NC.square().sum(dim=(-2, -1))


@converging()
def spectral_adversary(
    support_ND: Tensor,
    support_labels_NC: Tensor,
    query_MD: Tensor,
    query_labels_MC: Tensor,
    horizon: float,
    feature_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """A_t of docs/method.md, section 3: held-out and support R² of a ridge probe with λ = σ₁(ΦᵀΦ)/t.

    ``horizon`` t is in gradient-descent steps at rate 1/σ₁: the probe fits about what that many steps would. Features
    and labels are centred by support means; σ₁ is detached, so the defender cannot win by rescaling. λ never falls
    below the square of the features' own rounding noise: features collapsed to one point give R² = 0, not a
    singular solve. Features may be stacks of matrices of one shape (``...``×N×D) over the same labels.

    Returns:
        (held-out R², support R²), float64 of shape ``...`` (zero-dimensional for matrices), differentiable in both
        feature tensors.

    Raises:
        SpectrumError: fewer than two support rows, widths that differ, or a horizon that is not positive.
        DecompositionError: features that are NaN, infinite or too large.
    """
    for features in (support_ND, query_MD):
        check_features(features, stacked=True)
    if support_ND.shape[-2] < 2 or support_ND.shape[-1] != query_MD.shape[-1]:
        raise SpectrumError(
            f"expected at least two support rows and one width for support and query, got {tuple(support_ND.shape)} "
            f"and {tuple(query_MD.shape)}: raise the harmful batch size."
        )
    if not horizon > 0:
        raise SpectrumError(f"expected a positive horizon in gradient-descent steps, got {horizon}.")
    support, query = to_double(support_ND), to_double(query_MD)
    labels, query_labels = support_labels_NC.to(support), query_labels_MC.to(support)
    phi_mean, label_mean = support.mean(dim=-2, keepdim=True), labels.mean(dim=-2, keepdim=True)
    raw_norm = torch.linalg.vector_norm(support.detach(), dim=(-2, -1))
    support, query = support - phi_mean, query - phi_mean
    labels, query_labels = labels - label_mean, query_labels - label_mean
    rows, width = support.shape[-2:]
    noise = singular_value_floor(raw_norm, raw_norm, rows, width, feature_dtype or support_ND.dtype)
    small = support.detach()
    gram = small @ small.mT if rows <= width else small.mT @ small
    sigma_1 = torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0)
    # tiny: features that are exactly zero everywhere have no noise either, and must still solve (to weights of zero).
    penalty = torch.maximum(sigma_1 / horizon, noise.square()).clamp(min=torch.finfo(support.dtype).tiny)
    weights = ridge_weights(support, labels, penalty)
    return r_squared(query_labels - query @ weights, query_labels), r_squared(labels - support @ weights, labels)


def ridge_accuracies(
    support_ND: Tensor,
    support_labels_N: Tensor,
    query_MD: Tensor,
    query_labels_M: Tensor,
    horizons: Sequence[float],
    feature_dtype: torch.dtype | None = None,
) -> Tensor:
    """Held-out accuracies of ridge probes on one-hot labels with λ = σ₁(ΦᵀΦ)/t, one for each horizon t, from one SVD.

    Features and labels are centred by support means. Directions below the features' own rounding noise do not count.

    Args:
        support_ND, query_MD: features, N×D and M×D.
        support_labels_N, query_labels_M: integer classes.
        horizons: t, in gradient-descent steps at rate 1/σ₁.

    Returns:
        Shares of query rows in 0..1, float64, one per horizon.

    Raises:
        SpectrumError: features that are not finite or not a matrix.
    """
    classes = int(torch.cat([support_labels_N, query_labels_M]).max()) + 1
    targets = torch.nn.functional.one_hot(support_labels_N.long(), classes)
    answers = _ridge_answers(support_ND, targets, query_MD, horizons, feature_dtype)
    wanted = query_labels_M.cpu()
    return torch.stack([(found.argmax(dim=1).cpu() == wanted).double().mean() for found in answers])


def ridge_r_squared(
    support_ND: Tensor,
    support_targets_NC: Tensor,
    query_MD: Tensor,
    query_targets_MC: Tensor,
    horizons: Sequence[float],
    feature_dtype: torch.dtype | None = None,
) -> Tensor:
    """Held-out R² of ridge probes on targets of any kind, one for each horizon, as in ``ridge_accuracies``.

    R² = 1 − ‖Y − Ŷ‖²/‖Y − ȳ‖² over all C columns together, ȳ the support targets' mean: 0 for a probe that answers with
    the mean, below 0 for a worse one.

    Args:
        support_targets_NC, query_targets_MC: numbers, or 0 and 1 for several labels; N and M for one column.

    Returns:
        float64, one per horizon.

    Raises:
        SpectrumError: features that are not finite or not a matrix, or query targets that are all the mean.
    """
    targets, wanted = (to_double(part.reshape(len(part), -1)) for part in (support_targets_NC, query_targets_MC))
    residual = wanted - targets.mean(dim=0)
    if not residual.square().sum() > 0:
        raise SpectrumError("expected targets of at least two values, got constant ones: nothing is to be learned.")
    answers = _ridge_answers(support_ND, targets, query_MD, horizons, feature_dtype)
    return torch.stack([r_squared(wanted - found.to(wanted), residual) for found in answers])


@converging()
def _ridge_answers(
    support_ND: Tensor, targets_NC: Tensor, query_MD: Tensor, horizons: Sequence[float],
    feature_dtype: torch.dtype | None,
) -> list[Tensor]:
    """What ridge probes with λ = σ₁(ΦᵀΦ)/t answer for the query rows, M×C for each horizon t, from one SVD."""
    for features in (support_ND, query_MD):
        check_features(features)
    support, query = to_double(support_ND.detach()), to_double(query_MD.detach())
    targets = targets_NC.to(support)
    raw_norm = torch.linalg.vector_norm(support)
    phi_mean, label_mean = support.mean(dim=0), targets.mean(dim=0)
    left, sigma, right = torch.linalg.svd(support - phi_mean, full_matrices=False)
    rows, width = support.shape
    floor = singular_value_floor(raw_norm, raw_norm, rows, width, feature_dtype or support_ND.dtype)
    kept = sigma > floor
    fitted, seen = left.T @ (targets - label_mean), (query - phi_mean) @ right.T
    found = []
    for horizon in horizons:
        shrunk = torch.where(kept, sigma / (sigma.square() + sigma.square()[:1] / horizon), torch.zeros_like(sigma))
        found.append((seen * shrunk.nan_to_num(0.0)) @ fitted + label_mean)
    return found


def steps_to_residual(sigma_S: Tensor, energy_S: Tensor, kept_S: Tensor, tolerance: float) -> float:
    """t ≥ 0 with Σ_i (1 − σ_i²/σ₁²)^{2t} e_i + (1 − Σ_i e_i) = ε over the singular values that count; ``inf`` for none.

    Args:
        sigma_S: singular values of centred features, descending.
        energy_S: share e_i of the centred labels' squared norm along each left singular vector.
        kept_S: which singular values are above the noise.
        tolerance: ε.
    """
    energy = energy_S[kept_S]
    unreachable = 1 - energy.sum()
    if not unreachable < tolerance:
        return float("inf")
    # log1p keeps (1 - x)^(2t) exact for the tiny x of an ill-conditioned spectrum.
    square = (sigma_S[kept_S] / sigma_S[0]).square().clamp(max=1 - torch.finfo(sigma_S.dtype).eps)
    rate = torch.log1p(-square)

    def residual(steps: float) -> float:
        return float((energy * torch.exp(2 * steps * rate)).sum() + unreachable)

    low, high = 0.0, 1.0
    while residual(high) > tolerance:
        low, high = high, high * 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if residual(middle) > tolerance else (low, middle)
    return high
