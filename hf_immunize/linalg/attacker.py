"""Gradient descent of a softmax probe, written out so that it can be differentiated in the features.

Shape legend: N rows, D columns (feature width), C classes; ``...`` a stack of probes over the same rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_descent(
    features_ND: Tensor, targets_NC: Tensor, weights_DC: Tensor, bias_C: Tensor, *, rate: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """W ← W − rate·Φᵀ(softmax(ΦW + b) − Y)/N and b ← b − rate·mean(softmax − Y), ``steps`` times.

    Cross-entropy's curvature in (W, b) is at most half the largest eigenvalue of [Φ 1]ᵀ[Φ 1]/N, so a rate up to
    4 over that eigenvalue cannot diverge. Differentiable in the features through every step. Features, weights, bias
    and rate may be stacks (``...`` before their own dimensions) over shared targets.
    """
    rows, rate = features_ND.shape[-2], rate[..., None]
    for _ in range(steps):
        error_NC = torch.softmax(features_ND @ weights_DC + bias_C[..., None, :], dim=-1) - targets_NC
        weights_DC = weights_DC - rate[..., None] * (features_ND.mT @ error_NC) / rows
        bias_C = bias_C - rate * error_NC.mean(dim=-2)
    return weights_DC, bias_C
