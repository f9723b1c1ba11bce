"""Condition-number regularizers and the closed-form adversary: a spectrum or rows in, one float64 scalar out.

None of them knows which task is harmful, what its weight is, or that a trainer exists. Of a stack (a spectrum of
several matrices of one shape, or features ``...``×N×D over the same labels) each gives one value per matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg import Spectrum, softmax_descent, spectral_adversary, to_double


def well_conditioned(spectrum: Spectrum) -> Tensor:
    """R_well(M) = ½‖M‖₂² − ‖M‖_F²/(2p), p the feature width; zero iff all p eigenvalues are equal. Lowers κ.

    Nenov et al. 2024; Zheng et al. 2025, eq. 6. Scale: multiplying features by s multiplies it by s⁴ (M is a second
    moment); the batch size does not enter.
    """
    return 0.5 * spectrum.largest.square() - spectrum.frobenius_squared / (2 * spectrum.width)


def ill_conditioned(spectrum: Spectrum) -> Tensor:
    """R_ill(M) = 1 / (‖M‖_F²/(2k) − ½λ_k²), k the numerical rank. Minimising it raises κ.

    Zheng et al. 2025, eq. 9; 1/log κ(M) ≤ λ_max² R_ill(M). Scale: multiplying features by s multiplies it by s⁻⁴.
    A perfectly conditioned M, up to rounding of its eigenvalues, gives ``inf`` with a zero gradient: every direction is
    as good as any other there.
    """
    gap = spectrum.ill_gap
    perfect = ~(gap > 0)
    value = torch.where(perfect, torch.ones_like(gap), gap).reciprocal()
    infinite = torch.where(torch.isfinite(gap), torch.full_like(gap, torch.inf), gap)
    return torch.where(perfect, infinite, value)


def log_condition(spectrum: Spectrum) -> Tensor:
    """log κ(M) over the nonzero spectrum: the "Opt κ" baseline, in log form so that its gradient is scale-free."""
    return spectrum.log_condition


def closed_form_adversary(
    features_ND: Tensor,
    labels_N: Tensor,
    *,
    horizon: float,
    memorization: float = 0.0,
    feature_dtype: torch.dtype | None = None,
) -> Tensor:
    """relu(A_t) + memorization·relu(support R²) of docs/method.md, section 3, averaged over both roles of the halves.

    The rows are split by alternating within each class, so that support and query hold the same classes; classes
    with one row are left out. ``horizon`` t is in gradient-descent steps at rate 1/σ₁. Scale-free in the features.

    Args:
        features_ND: N×D features of harmful rows.
        labels_N: N integer class labels; kept on the CPU they cost no wait for the device.
        horizon: t > 0. Choose it so that A_t starts above 0: below, relu gives no gradient.
        memorization: weight of the same R² measured on the support rows themselves.
        feature_dtype: dtype the features were computed in, if they have since been cast; floors the ridge.

    Raises:
        SpectrumError: fewer than two classes with at least two rows each.
    """
    support, query = _beside(features_ND, *alternate_within_classes(labels_N))
    targets = torch.nn.functional.one_hot(labels_N.long(), int(labels_N.max()) + 1)
    (targets,) = _beside(features_ND, targets)
    total = features_ND.new_zeros((), dtype=torch.float64)
    halves = {part: (features_ND.index_select(-2, rows), targets[rows]) for part, rows in enumerate((support, query))}
    for learn, judge in ((0, 1), (1, 0)):
        held_out, seen = spectral_adversary(*halves[learn], *halves[judge], horizon, feature_dtype)
        total = total + torch.relu(held_out) + memorization * torch.relu(seen)
    return total / 2


def alternate_within_classes(labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Row indices of two halves that hold each class equally often (an odd row of a class is dropped).

    Raises:
        SpectrumError: fewer than two classes with at least two rows each.
    """
    order = torch.argsort(labels_N, stable=True)
    _, counts = torch.unique_consecutive(labels_N[order], return_counts=True)
    start = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    place = torch.arange(len(order), device=order.device) - start
    paired = place < torch.repeat_interleave(counts - counts % 2, counts)
    if int((counts >= 2).sum()) < 2:
        raise SpectrumError(
            f"expected at least two classes with two rows each in a harmful batch, got class counts {counts.tolist()}: "
            "raise per_device_harmful_batch_size or lower harmful_classes_per_batch."
        )
    return order[paired & (place % 2 == 0)], order[paired & (place % 2 == 1)]


def _beside(features_ND: Tensor, *small: Tensor) -> list[Tensor]:
    """Indices and targets on the features' device, without waiting for it."""
    return [value.to(features_ND.device, non_blocking=True) for value in small]


def simulated_attacker(
    features_ND: Tensor, labels_N: Tensor, start: tuple[Tensor, Tensor], *, rate: Tensor, steps: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """relu(1 − L/log C), L the query cross-entropy after an attacker's steps on the support; and its weights then.

    IMMA (Zheng & Yeh 2024) on the classifier: the inner problem is descended from where the last step left the
    attacker, and the harmful loss it reaches is raised through these steps. IMMA raises L without bound; here it is
    raised to log C, chance level, beyond which nothing is gained and the primary task pays.

    Args:
        features_ND: N×D features of harmful rows.
        labels_N: N integer class labels.
        start: the attacker's weights (D×C) and bias (C).
        rate: of descent, for features centred by the support mean.
        steps: of descent.

    Raises:
        SpectrumError: fewer than two classes with at least two rows each.
    """
    features, support, query, targets = _attacker_rows(features_ND, labels_N, start)
    learnt = features.index_select(-2, support)
    weights, bias = softmax_descent(learnt, targets[support], *start, rate=rate, steps=steps)
    loss = _cross_entropy(features.index_select(-2, query) @ weights + bias[..., None, :], targets[query])
    chance = math.log(start[1].shape[-1])
    return torch.relu(1 - loss / chance), (weights.detach(), bias.detach())


def attacker_training_loss(
    features_ND: Tensor, labels_N: Tensor, start: tuple[Tensor, Tensor], *, rate: Tensor, steps: int
) -> Tensor:
    """Cross-entropy on the support rows, under the classifier that ``simulated_attacker`` reaches, itself held.

    What the attacker descends in all that lies before its classifier; of the query rows, which judge it, nothing
    enters. Arguments and errors are those of ``simulated_attacker``.
    """
    features, support, _, targets = _attacker_rows(features_ND, labels_N, start)
    learnt = features.index_select(-2, support)
    with torch.no_grad():
        weights, bias = softmax_descent(learnt, targets[support], *start, rate=rate, steps=steps)
    return _cross_entropy(learnt @ weights + bias[..., None, :], targets[support])


def _attacker_rows(
    features_ND: Tensor, labels_N: Tensor, start: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features centred by the support mean, rows of support and query, and one-hot targets."""
    support, query = _beside(features_ND, *alternate_within_classes(labels_N))
    features = to_double(features_ND)
    features = features - features.index_select(-2, support).mean(dim=-2, keepdim=True)
    (targets,) = _beside(features, torch.nn.functional.one_hot(labels_N.long(), start[1].shape[-1]))
    return features, support, query, targets.to(features)


def _cross_entropy(logits_NC: Tensor, targets_NC: Tensor) -> Tensor:
    """Mean over rows; torch's own takes the second dimension for the classes, which in a stack are the last."""
    return -(torch.log_softmax(logits_NC, dim=-1) * targets_NC).sum(dim=-1).mean(dim=-1)
