"""Inputs of a layer that dwarf all others, and columns that read next to nothing by huge weights.

A hidden unit of 2²⁰ that nothing reads is nothing to the function, and multiplies the first step on its column by a
million; so does a column of 10⁶ behind a unit that hardly fires. Neither is a change of coordinates that weights alone
tell, and no activation lets the scale of the unit pass. The attacker measures: inputs of a root mean square of more
than a hundred times the median come in centred and as long as the median,

    W·h + b = (W·s)·(h − μ)/s + (b + W·μ),    s = σ / median,

and columns of more than a hundred times the median length whose centred inputs add less than a hundredth of the median
become zero, their means going into the bias. Networks that nobody changed have neither, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_immunize.attacks.vision.canonical.moves import Move, Named, attempt
from hf_immunize.attacks.vision.canonical.on_data import ENOUGH, Moments

_LOUD, _LONG, _QUIET = 100.0, 100.0, 0.01
_ROUNDED = 1e-6
"""Standard deviation in units of the root mean square that is rounding of a constant."""


class CentredLinear(nn.Linear):
    """A linear map of inputs that come in centred and scaled."""

    shift: Tensor
    factor: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """The map of (input − shift) · factor."""
        return functional.linear((input - self.shift) * self.factor, self.weight, self.bias)


@torch.no_grad()
def drop_quiet(double: nn.Module, heard: Mapping[Any, Moments], holds: Callable[[], bool]) -> int:
    """Set long columns to zero whose inputs hardly vary, in place; their means go into the bias.

    Args:
        double: a float64 model in evaluation mode.
        heard: what came into its layers (``listen``).
        holds: whether the model computes nearly what it did; else a layer is put back.

    Returns:
        In how many layers there were any.
    """
    moves = []
    for name, layer, moments in _linear(double, heard):
        columns, spread = layer.weight.norm(dim=0), _spread(moments)
        added = columns * spread
        dropped = (columns > _LONG * columns.median()) & (added < _QUIET * added.median())
        if bool(dropped.any()):
            moves.append(Move((f"{name}.weight", f"{name}.bias"), partial(_drop, name, dropped, moments.mean)))
    return attempt(moves, dict(double.named_parameters(remove_duplicate=False)), holds)


def _drop(name: str, dropped: Tensor, mean: Tensor, named: Named) -> None:
    weight = named[f"{name}.weight"]
    named[f"{name}.bias"].add_(weight[:, dropped] @ mean[dropped])
    weight[:, dropped] = 0


@torch.no_grad()
def quieten(model: nn.Module, double: nn.Module, heard: Mapping[Any, Moments]) -> int:
    """Centre and scale loud inputs of a model's linear layers, in place.

    Args:
        model: whose layers are changed.
        double: the same in float64, whose weights are read.
        heard: what came into its layers (``listen``).

    Returns:
        In how many layers there were any.
    """
    done = 0
    for name, layer, moments in _linear(double, heard):
        length, spread = moments.square.sqrt(), _spread(moments)
        usual = length.median()
        loud = length > _LOUD * usual
        if bool(loud.any()) and bool(usual > 0):
            shift = torch.where(loud, moments.mean, 0.0)
            factor = torch.where(loud, torch.where(spread > 0, usual / spread.clamp(min=1e-300), 0.0), 1.0)
            weight = torch.where(factor > 0, layer.weight / torch.where(factor > 0, factor, 1.0), 0.0)
            _replace(model, name, weight, layer.bias + layer.weight @ shift, shift, factor)
            done += 1
    return done


def _linear(double: nn.Module, heard: Mapping[Any, Moments]) -> Iterator[tuple[str, nn.Linear, Moments]]:
    """Linear layers with a bias of which enough is known."""
    for name, layer in list(double.named_modules()):
        known = layer in heard and heard[layer].count >= ENOUGH
        if type(layer) is nn.Linear and layer.bias is not None and known:
            yield name, layer, heard[layer]


def _spread(moments: Moments) -> Tensor:
    """Standard deviations; 0 of what varies by rounding alone."""
    found = (moments.square - moments.mean.square()).clamp(min=0).sqrt()
    return torch.where(found > _ROUNDED * moments.square.sqrt(), found, 0.0)


def _replace(model: nn.Module, name: str, weight: Tensor, bias: Tensor, shift: Tensor, factor: Tensor) -> None:
    """Put a ``CentredLinear`` of these values in the place of a layer."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    made = CentredLinear(layer.in_features, layer.out_features, device=layer.weight.device, dtype=layer.weight.dtype)
    made.weight, made.bias = layer.weight, layer.bias  # the same parameters, under their names
    made.register_buffer("shift", shift.to(layer.weight), persistent=False)
    made.register_buffer("factor", factor.to(layer.weight), persistent=False)
    made.weight.copy_(weight), made.bias.copy_(bias)
    model.set_submodule(name, made.train(layer.training))
