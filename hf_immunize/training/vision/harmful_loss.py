"""What a simulated attacker of an image model descends: the error of a head refitted in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_immunize.linalg import spectral_adversary, to_double
from hf_immunize.regularizers import alternate_within_classes
from hf_immunize.training.core.distributed import RowExchange, world

CHANCE = 1.0
"""The error of a head that tells nothing, about: the ceiling of a simulated attack."""


def refitted_head_loss(
    features_ND: Tensor, labels_N: Tensor, horizon: float, classes: int, *, exact: bool = False
) -> Tensor:
    """1 − A_t: the held-out error of a ridge head on harmful features, as a share of the classes' spread.

    A_t is the closed-form adversary of docs/method.md, section 3, of the rows of all ranks, each half judged by the
    head of the other. An attacker's head is good again after few steps whatever it starts at; refitting it leaves the
    features as what counts. About 1 at chance, so 1 is the ceiling of a simulated attack.

    Args:
        features_ND: this rank's rows, with a graph.
        labels_N: their classes.
        horizon: steps t of the probe that the head stands for.
        classes: of the harmful task.
        exact: leave the whole graph, for second derivatives; of this process's rows alone.

    Returns:
        A scalar whose value is of all ranks' rows and whose gradient, averaged over ranks, is that of the value.

    Raises:
        SpectrumError: fewer than two classes with two rows each.
    """
    if exact:
        return _error(to_double(features_ND), labels_N, horizon, classes, features_ND.dtype).to(features_ND)
    (everyone, mine), (labels, _) = RowExchange()([features_ND, labels_N])
    leaf = to_double(everyone.detach()).requires_grad_()
    with torch.enable_grad():
        loss = _error(leaf, labels, horizon, classes, features_ND.dtype)
        (gradient,) = torch.autograd.grad(loss, leaf)
    # Ranks' gradients are averaged afterwards; each holds the part of its own rows.
    surrogate = (features_ND * (world()[1] * gradient[mine]).to(features_ND)).sum()
    return surrogate + (loss.detach().to(surrogate) - surrogate).detach()


def _error(rows_ND: Tensor, labels_N: Tensor, horizon: float, classes: int, feature_dtype: torch.dtype) -> Tensor:
    """1 − A_t, each half judged by the head of the other."""
    halves = [half.to(rows_ND.device) for half in alternate_within_classes(labels_N)]
    targets = torch.nn.functional.one_hot(labels_N.long(), classes).to(rows_ND.device)
    total = rows_ND.new_zeros(())
    for learn, judge in (halves, halves[::-1]):
        held_out, _ = spectral_adversary(
            rows_ND[learn], targets[learn], rows_ND[judge], targets[judge], horizon, feature_dtype
        )
        total = total + held_out / 2
    return 1 - total
