"""One scale of every channel of a network, chosen from the function alone, and the weights that go with it.

Of all weights with the same function that differ in scales, the normal form is the one where

* the gains and shifts of a norm have root mean square 1 in every group of channels that must share a scale (a batch
  norm's gain counts as the standard deviation that it gives: γ·√(v/(v+ε))),
* rows of weights whose output only norms read have root mean square length 1,
* everywhere else what writes a channel and what reads it are equally long, which is the smallest sum of squares
  (Stock et al. 2019, equi-normalization).

None of these depends on the scales that the weights came with. Running statistics and epsilons move along, so that the
function is the same in evaluation mode; in training mode too but for batch norms whose variance is not large beside ε.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.attacks.vision.canonical.anatomy import Anatomy, Layer, Norm
from hf_immunize.attacks.vision.canonical.links import FIXED

_ROUNDS = 500
_ENOUGH = 1e-10
"""Rounds of balancing, and the largest change of a log scale at which they end."""


class Roots:
    """Variables of an anatomy as indices of roots and signs."""

    def __init__(self, anatomy: Anatomy):
        links = anatomy.links
        found = [links.root(variable) for variable in range(len(links))]
        self.index = torch.tensor([root for root, _ in found])
        self.sign = torch.tensor([sign for _, sign in found], dtype=torch.float64)
        self.count = len(links)
        self.log = torch.zeros(self.count, dtype=torch.float64)
        """Log scale of every root; that of the fixed one stays 0."""

    def of(self, variables: Tensor) -> Tensor:
        """Log scales of variables."""
        return self.sign[variables] * self.log[self.index[variables]]

    def total(self, variables: Tensor, values: Tensor, sign: int) -> Tensor:
        """Sum of ``values`` over the variables of every root that have this sign."""
        roots, signs = self.index[variables].flatten(), self.sign[variables].flatten()
        sums = torch.zeros(self.count, dtype=torch.float64)
        return sums.index_add_(0, roots, values.flatten().double() * (signs == sign))


def settle(anatomy: Anatomy, weights: Mapping[str, Tensor], apart: Tensor) -> Roots:
    """The log scale of every root.

    Args:
        weights: parameters and buffers in float64.
        apart: variables that other means take care of; their scale stays, and no row of theirs counts.
    """
    roots = Roots(anatomy)
    free = torch.ones(roots.count, dtype=torch.bool)
    free[FIXED] = False
    free[roots.index[apart]] = False
    for norm in anatomy.norms:  # the inverse of what a norm reads: no rule for that, and no network that has it
        free &= roots.total(norm.inputs, torch.ones(norm.inputs.shape), -1) == 0
    (ahead, counts), (behind, others) = (_gains(anatomy.norms, weights, roots, sign) for sign in (1, -1))
    one, two = free & (ahead > 0) & (others == 0), free & (ahead > 0) & (behind > 0)
    roots.log[one] = -0.5 * (ahead[one] / counts[one]).log()
    roots.log[two] = 0.25 * (behind[two] / others[two] * counts[two] / ahead[two]).log()
    _balance(anatomy, weights, roots, free & (counts + others == 0), apart)
    return roots


def _gains(norms: list[Norm], weights: Mapping[str, Tensor], roots: Roots, sign: int) -> tuple[Tensor, Tensor]:
    """Squared gains and shifts of every root whose scale (or its inverse) they have, and of how many channels."""
    squares = torch.zeros(roots.count, dtype=torch.float64)
    counts = torch.zeros_like(squares)
    for norm in norms:
        gain = weights[norm.weight].square()
        if norm.statistics:
            variance = weights[norm.statistics[1]]
            gain = gain * variance / (variance + norm.epsilon)
        if norm.bias:
            gain = gain + weights[norm.bias].square()
        squares += roots.total(norm.outputs, gain, sign)
        counts += roots.total(norm.outputs, torch.ones_like(gain), sign)
    return squares, counts


class _Masses:
    """Squared lengths of a layer's rows and columns under any scales."""

    def __init__(self, layer: Layer, weights: Mapping[str, Tensor]):
        self.layer = layer
        if layer.diagonal:
            self.squares = weights[layer.weight].square().view(1, -1)
        else:
            groups, width = layer.inputs.shape
            self.squares = weights[layer.weight].square().reshape(groups, layer.outputs.shape[1], width, -1).sum(-1)
        self.bias = weights[layer.bias].square().view_as(layer.outputs) if layer.bias else None

    def rows_and_columns(self, roots: Roots) -> tuple[Tensor, Tensor]:
        inward, outward = (-2 * roots.of(self.layer.inputs)).exp(), (2 * roots.of(self.layer.outputs)).exp()
        if self.layer.diagonal:
            both = self.squares * inward * outward
            return both, both
        rows = (self.squares @ inward[..., None])[..., 0]
        columns = (outward[:, None] @ self.squares)[:, 0]
        return (rows if self.bias is None else rows + self.bias) * outward, columns * inward


def _balance(
    anatomy: Anatomy, weights: Mapping[str, Tensor], roots: Roots, free: Tensor, apart: Tensor
) -> None:
    """Set the scales of the roots that no norm writes, in place."""
    hidden = torch.zeros(roots.count, dtype=torch.bool)
    hidden[roots.index[apart]] = True
    hidden[FIXED] = False
    touched = [
        layer for layer in anatomy.layers
        if bool(free[roots.index[torch.cat([layer.inputs.flatten(), layer.outputs.flatten()])]].any())
    ]  # fmt: skip
    layers = [_Masses(layer, weights) for layer in touched]
    stored = torch.zeros(roots.count, dtype=torch.float64)
    for name, variables in anatomy.tables.items():
        stored += roots.total(variables, weights[name].square(), 1)
    for _ in range(_ROUNDS):
        large, small, rows, columns = (torch.zeros(roots.count, dtype=torch.float64) for _ in range(4))
        for masses in layers:
            written, read = masses.rows_and_columns(roots)
            outputs, inputs = masses.layer.outputs, masses.layer.inputs
            # rows of a layer whose columns are set by other means say nothing yet
            written = written * ~hidden[roots.index[inputs]].any()
            for sign, there, back in ((1, large, small), (-1, small, large)):
                there += roots.total(outputs, written, sign)
                back += roots.total(inputs, read, sign)
            rows += roots.total(outputs, (written > 0).double(), 1)
            columns += roots.total(inputs, (read > 0).double(), 1)
        change = _changes(free, large, small, rows, columns, stored * (2 * roots.log).exp())
        roots.log += change
        if float(change.abs().max()) < _ENOUGH:
            return


def _changes(free: Tensor, large: Tensor, small: Tensor, rows: Tensor, columns: Tensor, stored: Tensor) -> Tensor:
    """Steps of all log scales: to balance, or to mean squares of 1 where there is but one side."""
    change = torch.zeros_like(large)
    both = free & (large + stored > 0) & (small > 0)
    written, read = free & (rows > 0) & (small == 0), free & (columns > 0) & (large + stored == 0)
    change[both] = 0.125 * (small[both] / (large + stored)[both]).log()
    change[written] = -0.5 * (large[written] / rows[written]).log()
    change[read] = 0.5 * (small[read] / columns[read]).log()
    return change


@torch.no_grad()
def standardise(model: nn.Module, kernels: Sequence[str]) -> None:
    """Give rows that are used in units of their own mean and spread a mean of 0 and a length of 1, in place.

    Their epsilon, beside which the variance of a row is to be large, makes this all but exact.
    """
    named = dict(model.named_parameters())
    for name in kernels:
        rows = named[name].flatten(1)
        rows = rows - rows.mean(dim=1, keepdim=True)
        lengths = rows.norm(dim=1, keepdim=True)
        named[name].copy_((rows / torch.where(lengths > 0, lengths, 1.0)).view_as(named[name]))


@torch.no_grad()
def rescale(anatomy: Anatomy, model: nn.Module, roots: Roots) -> None:
    """Write the weights, statistics and epsilons that belong to these scales into a float64 model, in place."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    for layer in anatomy.layers:
        inward, outward = (-roots.of(layer.inputs)).exp(), roots.of(layer.outputs).exp()
        weight = named[layer.weight]
        if layer.diagonal:
            weight.mul_((inward * outward).view_as(weight))
            continue
        groups, width = inward.shape
        grouped = weight.reshape(groups, outward.shape[1], width, -1)
        weight.copy_((grouped * inward[:, None, :, None] * outward[:, :, None, None]).view_as(weight))
        if layer.bias:
            named[layer.bias].mul_(outward.flatten())
    for norm in anatomy.norms:
        inward, outward = roots.of(norm.inputs).exp(), roots.of(norm.outputs).exp()
        if norm.statistics:
            mean, variance = (named[name] for name in norm.statistics)
            before = (variance + norm.epsilon).sqrt()
            mean.mul_(inward), variance.mul_(inward.square())
            named[norm.weight].mul_((variance + norm.epsilon).sqrt() / (before * inward))
        else:
            owner: Any = model.get_submodule(norm.weight.rpartition(".")[0])
            owner.eps = owner.eps * float(inward.square())
        named[norm.weight].mul_(outward)
        if norm.bias:
            named[norm.bias].mul_(outward)
    for name, variables in anatomy.tables.items():
        named[name].mul_(roots.of(variables).exp())
