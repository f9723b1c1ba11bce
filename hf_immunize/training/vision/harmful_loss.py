"""What a simulated attacker of an image model descends: the error of a head refitted in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_immunize.linalg import spectral_adversary, to_double
from hf_immunize.regularizers import alternate_within_classes
from hf_immunize.training.core.distributed import RowExchange, world


def refitted_head_loss(features_ND: Tensor, labels_N: Tensor, horizon: float, classes: int) -> Tensor:
    """1 − A_t: the held-out error of a ridge head on harmful features, as a share of the classes' spread.

    A_t is the closed-form adversary of docs/method.md, section 3, of the rows of all ranks, each half judged by the
    head of the other. An attacker's head is good again after few steps whatever it starts at; refitting it leaves the
    features as what counts. About 1 at chance, so 1 is the ceiling of a simulated attack.

    Args:
        features_ND: this rank's rows, with a graph.
        labels_N: their classes.
        horizon: steps t of the probe that the head stands for.
        classes: of the harmful task.

    Returns:
        A scalar whose value is of all ranks' rows and whose gradient, averaged over ranks, is that of the value.

    Raises:
        SpectrumError: fewer than two classes with two rows each.
    """
    (everyone, mine), (labels, _) = RowExchange()([features_ND, labels_N])
    leaf = to_double(everyone.detach()).requires_grad_()
    with torch.enable_grad():
        halves = [half.to(leaf.device) for half in alternate_within_classes(labels)]
        targets = torch.nn.functional.one_hot(labels.long(), classes).to(leaf.device)
        total = leaf.new_zeros(())
        for learn, judge in (halves, halves[::-1]):
            held_out, _ = spectral_adversary(
                leaf[learn], targets[learn], leaf[judge], targets[judge], horizon, features_ND.dtype
            )
            total = total + held_out / 2
        loss = 1 - total
        (gradient,) = torch.autograd.grad(loss, leaf)
    # Ranks' gradients are averaged afterwards; each holds the part of its own rows.
    surrogate = (features_ND * (world()[1] * gradient[mine]).to(features_ND)).sum()
    return surrogate + (loss.detach().to(surrogate) - surrogate).detach()
