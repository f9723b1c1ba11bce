"""Inputs of a layer that add far more than what comes out of it, because they cancel.

Units that are nearly equal, or of which one is the sum of others, may add c·w, −c·w and so on: next to nothing
together, until a step of training moves them apart by a little and c multiplies it. No two of them are proportional
(``twins``). They are told by what they add: columns whose contributions are many times their sum. In the normal form
such columns W are the ridge solution that computes the same on the attacker's images,

    min over W', b' of E‖W'h + b' − (Wh + b)‖² + μ·Σ_j E[h_j²]·‖W'_j‖²,

with the largest μ at which outputs move by no more than 3 % of their length. So this, alone in the normal form,
changes the function, by less than a few steps of fine-tuning do, and only where inputs cancel. In trained networks that
nobody changed no input adds as much as comes out: at most 0.9 of it in MobileNetV2, DINOv2, a ResNet and a ViT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.attacks.vision.canonical.moves import Move, Named, attempt
from hf_immunize.attacks.vision.canonical.on_data import ENOUGH, Moments, rows_of, run_with

_LOUD = 1.5
"""What one input adds, in units of what comes out of the layer, from which on inputs cancel."""
_OF_ROWS = 0.1
"""Share of a linear layer's outputs in which an input has to add that much, where they are asked one by one."""
_ALIVE = 1e-12
"""Variance of an output, in units of the median one, below which it is nobody's."""
_MOVED = 0.03
"""How far a layer's outputs may move, in units of their root mean square."""
_PENALTIES = tuple(10.0**-power for power in range(1, 15))
_ROWS_EACH = 2
"""Rows for each input below which a solution says more of the rows than of the network."""


@dataclass
class _Loud:
    """A layer whose inputs cancel, and what is seen of them.

    Args:
        name: of the layer.
        channels: those that add many times what comes out.
        square: mean over rows of the squared length of what comes out, or its variance.
    """

    name: str
    channels: Tensor
    square: float
    rows: int = 0
    moments: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Sums over rows of products of the channels and of a last one that is 1."""


@torch.no_grad()
def shrink_cancelling(
    model: nn.Module, heard: Mapping[Any, Moments], images: Tensor, holds: Callable[[], bool]
) -> int:
    """Give inputs that cancel the smallest columns that add the same, in place and in float64.

    Args:
        heard: what came into each layer of the model as it is (``listen``).
        images: the attacker's.
        holds: whether the model computes nearly what it did; else a layer is put back.

    Returns:
        In how many layers inputs cancelled.
    """
    found = _find(model, heard, images)
    if not found:
        return 0

    def hear(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        seen = rows_of(module, inputs[0])[:, found[module].channels]
        seen = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)
        found[module].moments = found[module].moments + seen.T @ seen
        found[module].rows += len(seen)

    _listen(model, images, found, hear)
    named = dict(model.named_parameters(remove_duplicate=False))
    return attempt([move for layer, loud in found.items() if (move := _shrinking(layer, loud))], named, holds)


def _find(model: nn.Module, heard: Mapping[Any, Moments], images: Tensor) -> dict[nn.Module, _Loud]:
    """Layers some of whose channels add many times what comes out: of it all, or of a tenth where they are linear.

    One output that is large and does nothing (a unit that never fires) hides no others.
    """
    names = {layer: name for name, layer in model.named_modules()
             if layer in heard and getattr(layer, "groups", 1) == 1 and heard[layer].count >= ENOUGH}
    seen: dict[nn.Module, Moments] = {}

    def hear(module: nn.Module, _: Any, outputs: Tensor) -> None:
        seen.setdefault(module, Moments()).add(rows_of(module, outputs))

    _listen(model, images, names, hear)
    found = {}
    for layer, moments in seen.items():
        square, added = float(moments.square.sum()), _columns(layer).square().sum(dim=2)
        loud = (added * heard[layer].square).sum(dim=0) > _LOUD**2 * square
        if _is_flat(layer):
            varies = _variance(moments)
            alive = varies > _ALIVE * varies.median()
            each = (added * _variance(heard[layer]))[alive] > _LOUD**2 * varies[alive, None]
            cancels = each.double().mean(dim=0) > _OF_ROWS
            loud, square = loud | cancels, float(varies[alive].sum())
        if bool(loud.any()):
            found[layer] = _Loud(names[layer], loud.nonzero()[:, 0], square)
    return found


def _variance(moments: Moments) -> Tensor:
    return (moments.square - moments.mean.square()).clamp(min=0)


def _is_flat(layer: nn.Module) -> bool:
    """Whether it is linear at every place by itself: the numbers that a kernel covers are alike, and cancel."""
    if not isinstance(layer, nn.Conv2d):
        return True
    return layer.weight[0, 0].numel() == 1 and layer.padding in ((0, 0), "valid")


def _listen(model: nn.Module, images: Tensor, layers: Mapping[nn.Module, Any], hear: Callable[..., None]) -> None:
    run_with([layer.register_forward_hook(hear) for layer in layers], model, images)


def _columns(layer: nn.Module) -> Tensor:
    """Rows × inputs × places of a kernel."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer.weight.reshape(*layer.weight.shape[:2], -1)


def _shrinking(layer: nn.Module, loud: _Loud) -> Move | None:
    """The ridge solution of one layer; None where no smaller columns add the same."""
    if loud.rows < _ROWS_EACH * len(loud.moments):
        return None
    with_bias = layer.bias is not None and _is_flat(layer)
    whole = loud.moments / loud.rows
    second, mean = whole[:-1, :-1], whole[:-1, -1]
    lengths = second.diagonal().sqrt()
    centred = second - mean[:, None] * mean if with_bias else second
    values, vectors = torch.linalg.eigh(centred / lengths[:, None] / lengths)
    values, before = values.clamp(min=0), _columns(layer)[:, loud.channels]
    along = torch.einsum("rkp,k,kd->rdp", before, lengths, vectors)  # columns for inputs along the eigenvectors
    power = along.square().sum(dim=(0, 2))
    allowed = _MOVED**2 * loud.square
    shares = (values / (values + penalty) for penalty in _PENALTIES)
    kept = next((share for share in shares if float(((1 - share).square() * values * power).sum()) <= allowed), None)
    if kept is None or float((kept.square() * power).sum()) > float(power.sum()) / 4:
        return None
    after = torch.einsum("rdp,d,kd,k->rkp", along, kept, vectors, 1 / lengths)
    shift = torch.einsum("rkp,k->r", before - after, mean)

    def shrink(named: Named) -> None:
        weight = named[f"{loud.name}.weight"]
        columns = weight.reshape(*weight.shape[:2], -1)
        columns[:, loud.channels] = after
        weight.copy_(columns.view_as(weight))
        if with_bias:
            named[f"{loud.name}.bias"].add_(shift)

    return Move((f"{loud.name}.weight", *([f"{loud.name}.bias"] if with_bias else [])), shrink)
