"""Inputs of a layer that are one number twice, and inputs that are no more than a bias.

Two hidden units that compute the same may add c·w and −c·w: nothing for any c, until a step of training moves the two
apart by a little and c multiplies it. So may a unit that never changes, against the bias behind it. Equal ones are
told by the activations, whatever comes between: channels that are proportional on every row. In the normal form their
columns are the smallest with the same sum, and constant ones went into the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hf_immunize.attacks.vision.canonical.moves import Move, Named, attempt
from hf_immunize.attacks.vision.canonical.on_data import ENOUGH, Moments

_EQUAL = 1e-9
"""How far directions of channels may be apart that count as one: above the rounding of float64 sums."""


@torch.no_grad()
def merge_twins(model: nn.Module, heard: Mapping[nn.Module, Moments], holds: Callable[[], bool]) -> int:
    """Merge inputs of linear maps and convolutions that are proportional on all rows seen, in place and in float64.

    Channels of which fewer than 32 values are not zero count for nothing.

    Args:
        heard: what came into each layer (``listen``).
        holds: whether the model computes what it did; else a layer is put back.

    Returns:
        In how many layers there was something to merge.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    moves = []
    for name, layer in model.named_modules():
        if layer in heard and getattr(layer, "groups", 1) == 1:
            groups, signed = _proportional(heard[layer])
            constant = _constant(layer, heard[layer])
            groups[constant.nonzero()[:, 0]] = -1
            if bool(constant.any()) or len(groups[groups >= 0].unique()) < int((groups >= 0).sum()):
                names = tuple(f"{name}.{part}" for part in ("weight", "bias") if f"{name}.{part}" in named)
                moves.append(_merging(names, groups, signed, constant, heard[layer]))
    return attempt(moves, named, holds)


def _proportional(moments: Moments) -> tuple[Tensor, Tensor]:
    """A group for each channel, −1 where too little is known of it, and its factor of the group's direction."""
    length = moments.drawn.norm(dim=1)
    unit = moments.drawn / length.clamp(min=torch.finfo(length.dtype).tiny)[:, None]
    sign = torch.where(unit[:, 0] < 0, -1.0, 1.0)
    unit = unit * sign[:, None]
    order = unit[:, 0].argsort()
    apart = (unit[order][1:] - unit[order][:-1]).abs().amax(dim=1) > _EQUAL
    groups = torch.zeros(len(unit), dtype=torch.long)
    groups[order[1:]] = apart.long().cumsum(0)
    groups[(moments.fired < ENOUGH) | (length == 0)] = -1
    return groups, sign * length


def _constant(layer: nn.Module, moments: Moments) -> Tensor:
    """Channels with one value on all rows, of a layer whose bias can take what they add."""
    flat = not isinstance(layer, nn.Conv2d) or layer.weight[0, 0].numel() == 1 and layer.padding in ((0, 0), "valid")
    if layer.bias is None or not flat:
        return torch.zeros(len(moments.drawn), dtype=torch.bool)
    value = moments.mean[:, None]
    same = (moments.drawn - value * moments.ones).abs().amax(dim=1) <= _EQUAL * moments.drawn.abs().amax(dim=1)
    return same & (moments.fired >= ENOUGH)


def _merging(names: tuple[str, ...], groups: Tensor, signed: Tensor, constant: Tensor, moments: Moments) -> Move:
    """Columns W_k = s_k·Σ s_j·W_j / Σ s_j² of channels s_k·h, and what constant ones add in the bias."""

    def merge(named: Named) -> None:
        whole = named[names[0]]
        weight = whole.reshape(*whole.shape[:2], -1)  # rows × channels × places of a kernel
        if bool(constant.any()):
            named[names[1]].add_(weight[:, constant].sum(-1) @ moments.mean[constant])
            weight[:, constant] = 0
        for group in groups[groups >= 0].unique().tolist():
            members = (groups == group).nonzero()[:, 0]
            if len(members) > 1:
                share = signed[members] / signed[members].norm()
                total = torch.einsum("rkp,k->rp", weight[:, members], share)
                weight[:, members] = total[:, None] * share[:, None]
        whole.copy_(weight.view_as(whole))

    return Move(names, merge)
