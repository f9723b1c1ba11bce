"""Terms on features that other defences published, each from its paper's formulas and none from its code.

What of a method is here and what is left out stands in docs/objectives.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_immunize import regularizers
from hf_immunize.linalg import converging
from hf_immunize.training.core.measured import Rows, Term, TermSettings

BANDWIDTHS = (0.5, 1.0, 2.0, 4.0)
"""Variances of the kernel, in units of the width: ‖x − y‖² of two draws of N(0, I) is about twice the width."""
TRAP_STEPS = 3
"""Steps of the probe that the trap looks ahead."""


def noise_discrepancy(features_ND: Tensor, bandwidths: tuple[float, ...] = BANDWIDTHS) -> Tensor:
    """MMD² between the rows and N(0, I), mean over Gaussian kernels of several widths; ≥ 0, 0 for N(0, I) itself.

    The noise loss of RepNoise (Rosati et al. 2024, Representation Noising, NeurIPS): harmful rows'
    representations are made indistinguishable from Gaussian noise. With k(x, y) = exp(−‖x − y‖²/2s), s = b·D, the
    expectations over the noise have a closed form (Gretton et al. 2012, Lemma 6, with Gaussian integrals), so that none
    is drawn:

        MMD² = mean_ij k(x_i, x_j) − 2 mean_i (s/(s+1))^{D/2} exp(−‖x_i‖²/(2(s+1))) + (s/(s+2))^{D/2}

    Args:
        features_ND: N×D rows of one layer.
    """
    width = features_ND.shape[-1]
    squares = features_ND.square().sum(dim=-1)
    distances = (squares[:, None] + squares[None, :] - 2 * features_ND @ features_ND.T).clamp(min=0)
    total = features_ND.new_zeros(())
    for bandwidth in bandwidths:
        s = bandwidth * width
        within = torch.exp(-distances / (2 * s)).mean()
        across = torch.exp(-squares / (2 * (s + 1)) + width / 2 * math.log(s / (s + 1))).mean()
        total = total + within - 2 * across + math.exp(width / 2 * math.log(s / (s + 2)))
    return total / len(bandwidths)


@converging()
def probe_trap(features_ND: Tensor, labels_N: Tensor, classes: int, steps: int = TRAP_STEPS) -> Tensor:
    """softplus(ΔL − ΔL₂): how much more a probe's few steps gain than the local quadratic says; ≥ 0.

    The trap of Sarker et al. 2025 for linear probing: a head W₀ of the class centroids takes ``steps`` steps of
    gradient descent on the cross-entropy of harmful rows, Δ = W_k − W₀, and

        ΔL = L(W₀) − L(W_k),   ΔL₂ = −(⟨∇L(W₀), Δ⟩ + ½ ⟨Δ, ∇²L(W₀) Δ⟩)

    The Hessian of a softmax regression acts in closed form: with u_i = Δᵀx_i and p_i the probabilities, its quadratic
    is mean_i (Σ_c p_ic u_ic² − (Σ_c p_ic u_ic)²). Features are divided by √λ₁ of their second moment, detached, so that
    rate 1 is safe and rescaling gains nothing; the paper's own rate is not in what could be read. At this rate a few
    steps hardly leave the quadratic: on the digits ΔL − ΔL₂ goes from 5e-5 to −8e-5 in a run of 200 steps, and the term
    from ln 2 to ln 2. Its gradient is balanced like any other (λ is in the thousands then), and little comes of it.

    Args:
        features_ND: N×D rows; labels_N: their classes, of ``classes``.
    """
    centred = features_ND - features_ND.mean(dim=0, keepdim=True).detach()
    largest = torch.linalg.matrix_norm(centred.detach(), ord=2).square() / len(centred)
    x = centred / largest.clamp(min=torch.finfo(centred.dtype).tiny).sqrt()
    y = torch.nn.functional.one_hot(labels_N.long(), classes).to(x)
    start = x.T @ y / y.sum(dim=0).clamp(min=1)

    def loss(weights_DC: Tensor) -> Tensor:
        return -(torch.log_softmax(x @ weights_DC, dim=-1) * y).sum(dim=-1).mean()

    def slope(weights_DC: Tensor) -> Tensor:
        return x.T @ (torch.softmax(x @ weights_DC, dim=-1) - y) / len(x)

    weights = start
    for _ in range(steps):
        weights = weights - slope(weights)
    delta = weights - start
    p, u = torch.softmax(x @ start, dim=-1), x @ delta
    curvature = ((p * u.square()).sum(dim=-1) - (p * u).sum(dim=-1).square()).mean()
    expected = -((slope(start) * delta).sum() + curvature / 2)
    return torch.nn.functional.softplus(loss(start) - loss(weights) - expected)


def _noise(rows: Rows, _: TermSettings) -> Tensor:
    return noise_discrepancy(rows.features)


def _trap(rows: Rows, settings: TermSettings) -> Tensor:
    regularizers.alternate_within_classes(rows.labels)  # two classes of two rows, or its error
    classes = settings.harmful_classes or int(rows.labels.max()) + 1
    return probe_trap(rows.features, rows.labels.to(rows.features.device), classes)


_NOISED = "Features are closer to noise as a whole; a probe of what still tells classes apart, and fine-tuning, go on."
_TRAPPED = "First steps from class centroids gain less than their slope says; more steps, or a closed form, go on."
REP_NOISE = Term("harmful_noise_mmd", "harmful", _noise, achieves=_NOISED)
TRAP = Term("harmful_probe_trap", "harmful", _trap, tells_classes_apart=True, achieves=_TRAPPED)
