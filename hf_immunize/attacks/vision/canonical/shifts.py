"""Constants that one layer adds and the next takes away again.

A norm's shift of 10^4 in every channel is nothing to the function when the biases of the layers that read it subtract
what it adds, and everything to whoever trains their weights. The same goes for the bias of values, since weights of
attention sum to 1, and for that of keys, which adds the same to all scores of a query. In the normal form none of them
has one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from hf_immunize.attacks.vision.canonical.anatomy import Anatomy, Layer, Norm
from hf_immunize.attacks.vision.canonical.links import FIXED
from hf_immunize.attacks.vision.canonical.moves import Move, Named, attempt
from hf_immunize.attacks.vision.canonical.products import Pair

_CANCELS = 0.1
"""What is left of a bias, in units of its length, when a table is added to it: where it is less, the two cancel."""


@torch.no_grad()
def join_constants(anatomy: Anatomy, named: Named, holds: Callable[[], bool]) -> int:
    """Give a bias what a table takes away from it on the same stream, in place and in float64.

    A patch bias of c and position embeddings of −c are nothing to the function, and make rows as long as c; so are a
    class token and its position.

    Args:
        holds: whether the model computes what it did; else a move is put back.

    Returns:
        How many pairs cancelled.
    """
    moves = []
    biases = [layer.bias for layer in anatomy.layers if layer.bias]
    for table in anatomy.tables:
        rows = named[table].flatten(0, -2) if named[table].dim() > 1 else named[table][None]
        tokens = [name for name in anatomy.tables if name != table and named[name].numel() == rows.shape[1]]
        first = len(tokens) if len(tokens) < len(rows) else 0  # positions of tokens that are no patches
        for bias in dict.fromkeys(biases):
            if named[bias].shape == rows.shape[1:] and _cancel(named[bias], rows[first:].mean(dim=0)):
                whole = Move((table, bias), partial(_join, table, bias, slice(0, len(rows))))
                moves.append(Move(whole.touched, partial(_join, table, bias, slice(first, len(rows))), whole))
        for place, token in enumerate(tokens[: len(rows)]):
            if _cancel(named[token].flatten(), rows[place]):
                moves.append(Move((table, token), partial(_join, table, token, slice(place, place + 1))))
    return attempt(moves, named, holds)


def _cancel(one: Tensor, other: Tensor) -> bool:
    return bool((one + other).norm() < _CANCELS * one.norm())


def _join(table: str, other: str, places: slice, named: Named) -> None:
    """Move the mean of some rows of a table into another constant."""
    rows = named[table].view(-1, named[table].shape[-1])[places]
    mean = rows.mean(dim=0)
    named[other].add_(mean.view_as(named[other]))
    rows.sub_(mean)


@torch.no_grad()
def unshift(anatomy: Anatomy, pairs: list[Pair], named: Mapping[str, Tensor]) -> int:
    """Move every constant as far as it goes, in place and in float64; returns how many layers had one.

    Whether attention's weights sum to 1 and nothing is padded in between no scale can tell: the caller checks outputs.
    """
    moved = 0
    for norm, readers in norms_read_by_layers(anatomy):
        if not norm.bias or not all(layer.bias and len(layer.inputs) == 1 for layer, *_ in readers):
            continue
        shift = named[norm.bias]
        for layer, columns, channels in readers:
            weight = named[layer.weight].flatten(2).sum(-1) if named[layer.weight].dim() > 2 else named[layer.weight]
            named[layer.bias or ""].add_(weight[:, columns] @ shift[channels])
        moved += bool(shift.any())
        shift.zero_()
    for pair in pairs:
        if not pair.transposed and pair.first.bias and pair.second.bias:
            constant = named[pair.first.bias]
            named[pair.second.bias].add_(named[pair.second.weight][:, pair.others] @ constant[pair.rows])
            moved += bool(constant[pair.rows].any())
            constant[pair.rows] = 0
    for layer, row in _keys(anatomy, pairs):
        moved += bool(named[layer.bias or ""][row])
        named[layer.bias or ""][row] = 0
    return moved


Reader = tuple[Layer, Tensor, Tensor]
"""A layer, its columns, and the norm's channels that they read."""


def norms_read_by_layers(anatomy: Anatomy) -> Iterator[tuple[Norm, list[Reader]]]:
    """Norms whose every channel goes straight into linear maps, and nowhere else."""
    links = anatomy.links
    crossed = {links.root(variable)[0] for variable in anatomy.mixed_or_stored}
    columns: dict[int, list[tuple[Layer, int]]] = defaultdict(list)
    written: dict[int, int] = defaultdict(int)
    for layer in anatomy.layers:
        for place, variable in enumerate(layer.inputs.flatten().tolist()):
            columns[links.root(variable)[0]].append((layer, place))
        for variable in layer.outputs.flatten().tolist():
            written[links.root(variable)[0]] += 1
    for norm in anatomy.norms:
        for variable in norm.outputs.tolist():
            written[links.root(variable)[0]] += 1
        for variable in set(norm.inputs.tolist()):
            crossed.add(links.root(variable)[0])
    for norm in anatomy.norms:
        roots = [links.root(variable)[0] for variable in norm.outputs.tolist()]
        if FIXED in roots or crossed & set(roots) or any(written[root] != 1 for root in roots):
            continue
        readers: dict[str, list[tuple[Layer, int, int]]] = defaultdict(list)
        for channel, root in enumerate(roots):
            for layer, place in columns[root]:
                readers[layer.weight].append((layer, place, channel))
        if readers and not any(parts[0][0].diagonal for parts in readers.values()):
            yield norm, [
                (parts[0][0], torch.tensor([part[1] for part in parts]), torch.tensor([part[2] for part in parts]))
                for parts in readers.values()
            ]


def _keys(anatomy: Anatomy, pairs: list[Pair]) -> Iterator[tuple[Layer, int]]:
    """Rows of the layers that make keys."""
    keys = {anatomy.links.root(variable) for _, key in anatomy.scores for variable in key.flatten().tolist()}
    for pair in pairs:
        for layer, rows in ((pair.first, pair.rows), (pair.second, pair.others)) if pair.transposed else ():
            for row in rows.tolist():
                if layer.bias and anatomy.links.root(int(layer.outputs.flatten()[row])) in keys:
                    yield layer, row
