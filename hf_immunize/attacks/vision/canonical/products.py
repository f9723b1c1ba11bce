"""Pairs of weights of which only the product matters: queries with keys, values with what reads them.

Between a head's queries and keys any invertible matrix can be slipped in with its inverse, and so between its values
and the output projection: the function does not change, but the factors can be made as badly conditioned as one likes.
The normal form takes the singular value decomposition of the product and gives each factor the square root of its
singular values. Of a linear layer that only the (new) head reads nothing but the row space matters: its singular values
become 1, and the old head takes them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_immunize.attacks.vision.canonical.anatomy import Anatomy, Layer
from hf_immunize.attacks.vision.canonical.links import FIXED

_SINGULAR = 1e-10
"""Singular values below this share of the largest make a layer before the head one that cannot be inverted."""
Owner = tuple[str, Layer | None, int]
"""What meets in a channel: ``out`` or ``in`` of a whole layer, or something else, and which row or column of it."""


@dataclass(frozen=True)
class Pair:
    """Rows of one layer that meet rows (``transposed``) or columns of another; ``variables`` are in between."""

    first: Layer
    rows: Tensor
    second: Layer
    others: Tensor
    transposed: bool
    variables: Tensor


def find_pairs(anatomy: Anatomy, head: str) -> tuple[list[Pair], list[Pair]]:
    """Pairs inside attention, and those of a layer and the head alone."""
    owners = _owners(anatomy)
    crossed = {anatomy.links.root(variable)[0] for variable in anatomy.links.mixed}
    inside: list[Pair] = []
    before_head: list[Pair] = []
    for query, key in anatomy.scores:
        for one, other in zip(query, key, strict=True):
            inside += _pair(anatomy, owners, crossed, one, {"out"}, other)
    for value in anatomy.values:
        for one in value:
            inside += _pair(anatomy, owners, crossed, one, {"out", "in"}, one)
    for layer in anatomy.layers:
        if layer.weight == f"{head}.weight":
            before_head += _pair(anatomy, owners, crossed, layer.inputs[0], {"out", "in"}, layer.inputs[0])
    return inside, before_head


def _owners(anatomy: Anatomy) -> Mapping[int, list[Owner]]:
    """What ends or begins at every root: a layer's row ("out") or column ("in"), or something else."""
    found: dict[int, list[Owner]] = defaultdict(list)
    for layer in anatomy.layers:
        plain = not layer.diagonal and len(layer.inputs) == 1 and layer.kernel == 1
        kind = ("out", "in") if plain else ("other", "other")
        for name, variables in zip(kind, (layer.outputs, layer.inputs), strict=True):
            for place, variable in enumerate(variables.flatten().tolist()):
                found[anatomy.links.root(variable)[0]].append((name, layer, place))
    for variables in (
        *(part for norm in anatomy.norms for part in (norm.inputs, norm.outputs)), *anatomy.tables.values(),
    ):  # fmt: skip
        for variable in set(variables.flatten().tolist()):
            found[anatomy.links.root(variable)[0]].append(("other", None, 0))
    return found


def _pair(
    anatomy: Anatomy, owners: Mapping[int, list[Owner]], crossed: set[int], one: Tensor, kinds: set[str], other: Tensor
) -> Iterator[Pair]:
    """The pair of these channels, where two whole layers meet in them and nothing else does."""
    roots = [anatomy.links.root(variable)[0] for variable in one.tolist()]
    if len(set(roots)) < len(roots) or FIXED in roots or crossed & set(roots) or -1 in one.tolist():
        return
    ends = [owners[root] for root in roots]
    if any(len(end) != 2 or {name for name, _, _ in end} != kinds for end in ends):
        return
    transposed = kinds == {"out"}
    whole = [[(name, layer, place) for name, layer, place in end if layer is not None] for end in ends]
    ordered = [sorted(end, key=lambda part: (part[0] == "in", part[1].weight)) for end in whole]
    firsts, seconds = ({id(end[place][1]) for end in ordered} for place in (0, 1))
    if len(firsts) != 1 or len(seconds) != 1:
        return
    first, second = ordered[0][0][1], ordered[0][1][1]
    rows, others = (torch.tensor([end[place][2] for end in ordered]) for place in (0, 1))
    yield Pair(first, rows, second, others, transposed, one)


@torch.no_grad()
def balance_pair(pair: Pair, named: Mapping[str, Tensor]) -> None:
    """Replace both factors by those of the normal form, in place and in float64."""
    left = _with_bias(pair.first, pair.rows, named)
    if pair.transposed:  # scores: columns of both meet
        one, other = left.T, _with_bias(pair.second, pair.others, named).T
    else:
        one, other = named[pair.second.weight][:, pair.others], left.T
    one, other = balanced(one, other)
    if pair.transposed:
        _write(pair.first, pair.rows, one.T, named)
        _write(pair.second, pair.others, other.T, named)
    else:
        named[pair.second.weight][:, pair.others] = one
        _write(pair.first, pair.rows, other.T, named)


def balanced(left_MD: Tensor, right_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors with the product left·rightᵀ and equal singular values: the square roots of the product's."""
    (basis, inner), (other_basis, other_inner) = torch.linalg.qr(left_MD), torch.linalg.qr(right_ND)
    u, sigma, vh = torch.linalg.svd(inner @ other_inner.T, full_matrices=False)
    width, found = left_MD.shape[1], len(sigma)
    root = sigma.sqrt()
    one, other = basis @ (u * root), other_basis @ (vh.T * root)
    pad = (0, width - found)
    return torch.nn.functional.pad(one, pad), torch.nn.functional.pad(other, pad)


@torch.no_grad()
def orthogonalise(pair: Pair, named: Mapping[str, Tensor]) -> bool:
    """Singular values 1 for the layer that only the head reads; False where it has no inverse."""
    weight, head = named[pair.first.weight], named[pair.second.weight]
    if weight.dim() != 2 or head.dim() != 2 or weight.shape[0] > weight.shape[1]:
        return False
    u, sigma, vh = torch.linalg.svd(weight[pair.rows], full_matrices=False)
    if float(sigma[-1]) <= _SINGULAR * float(sigma[0]):
        return False
    weight[pair.rows] = u @ vh
    if pair.first.bias:
        bias = named[pair.first.bias]
        bias[pair.rows] = (u / sigma) @ (u.T @ bias[pair.rows])
    head[:, pair.others] = head[:, pair.others] @ (u * sigma) @ u.T
    return True


def _with_bias(layer: Layer, rows: Tensor, named: Mapping[str, Tensor]) -> Tensor:
    weight = named[layer.weight][rows].flatten(1)
    return torch.cat([weight, named[layer.bias][rows, None]], dim=1) if layer.bias else weight


def _write(layer: Layer, rows: Tensor, values: Tensor, named: Mapping[str, Tensor]) -> None:
    weight = named[layer.weight]
    width = weight[0].numel()
    weight[rows] = values[:, :width].view_as(weight[rows])
    if layer.bias:
        named[layer.bias][rows] = values[:, width]
