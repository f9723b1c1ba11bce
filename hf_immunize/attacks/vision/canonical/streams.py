"""Streams that only linear maps and batch norms touch, as the linear bottlenecks of MobileNetV2.

What writes such a stream is a linear map and a batch norm, what reads it a linear map: a matrix of any condition can be
put into the writers and its inverse into the readers, and nothing of it shows in the function. In the normal form
writers and readers have the same Gram matrix, which is the smallest sum of squares over all such matrices; a rotation
stays open. Whitening by the covariance of images was tried and made a MobileNetV2 that nobody had planted anything in
worse to train (0.87 to 0.68 in 20 steps): its last stages have directions of a thousandth, which are no trick.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_immunize.attacks.vision.canonical.anatomy import Anatomy, Layer, Norm
from hf_immunize.attacks.vision.canonical.links import FIXED

_LEAST = 1e-12
"""Share of the largest eigenvalue that smaller ones are taken for."""
Channels = tuple[int, ...]


@dataclass(frozen=True)
class Stream:
    """Linear maps with the batch norm after each, which write it, and the linear maps that read it."""

    writers: tuple[tuple[Layer, Norm], ...]
    readers: tuple[Layer, ...]


def find_streams(anatomy: Anatomy) -> Iterator[Stream]:
    """Every stream of which all channels are written and read together, and met by nothing else that has weights.

    Whether a rectifier or the like lies on the way the anatomy does not tell: the caller checks outputs.
    """
    roots = _Roots(anatomy)
    for channels, norms in roots.norms.items():
        layers = [roots.whole_layer(norm) for norm in norms]
        readers = roots.readers.get(channels, [])
        parts = len(norms) + len(readers)
        free = len(set(channels)) == len(channels) > 1 and FIXED not in channels
        if free and readers and all(layers) and all(roots.uses[root] == parts for root in channels):
            writers = tuple((layer, norm) for layer, norm in zip(layers, norms, strict=True) if layer)
            yield Stream(writers, tuple(readers))


class _Roots:
    """Who writes and reads whole sets of channels, and how many things meet in each."""

    def __init__(self, anatomy: Anatomy):
        self._links = anatomy.links
        self.norms: dict[Channels, list[Norm]] = defaultdict(list)
        self.readers: dict[Channels, list[Layer]] = defaultdict(list)
        self._written: dict[Channels, list[Layer]] = defaultdict(list)
        self.uses: dict[int, int] = defaultdict(int)
        for norm in anatomy.norms:
            if norm.statistics:
                self.norms[self._count(norm.outputs)].append(norm)
            else:
                self._count(norm.outputs)
            self._count(norm.inputs)
        for layer in anatomy.layers:
            inputs, outputs = self._count(layer.inputs), self._count(layer.outputs)
            if not layer.diagonal and len(layer.inputs) == 1:
                self.readers[inputs].append(layer)
                self._written[outputs].append(layer)
        for table in (*anatomy.tables.values(), *anatomy.values, *(part for both in anatomy.scores for part in both)):
            self._count(table)

    def _count(self, variables: Tensor) -> Channels:
        found = tuple(self._links.root(variable)[0] for variable in variables.flatten().tolist() if variable >= 0)
        for root in set(found):
            self.uses[root] += 1
        return found

    def whole_layer(self, norm: Norm) -> Layer | None:
        """The linear map without a bias of its own that writes what this norm reads, where nothing else does."""
        channels = tuple(self._links.root(variable)[0] for variable in norm.inputs.flatten().tolist())
        found = self._written.get(channels, [])
        alone = len(found) == 1 and all(self.uses[root] == 2 for root in channels)
        return found[0] if alone and norm.bias and not found[0].bias and FIXED not in channels else None


@torch.no_grad()
def balance_streams(anatomy: Anatomy, model: nn.Module, holds: Callable[[], bool]) -> int:
    """Give every stream writers and readers of one Gram matrix, in place and in float64; returns how many got it.

    Batch norms are left with a mean of 0 and a variance of 1 that no data have: refit them (``on_data``) afterwards.

    Args:
        holds: whether the model computes what it did; else the stream is put back.
    """
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    done = 0
    for stream in find_streams(anatomy):
        held = {name: named[name].clone() for name in _touched(stream)}
        _balance(stream, named)
        if holds():
            done += 1
            continue
        for name, value in held.items():
            named[name].copy_(value)
    return done


def _touched(stream: Stream) -> Iterator[str]:
    for layer, norm in stream.writers:
        yield from (layer.weight, norm.weight, *([norm.bias] if norm.bias else []), *(norm.statistics or ()))
    for layer in stream.readers:
        yield layer.weight


def _written(layer: Layer, norm: Norm, named: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What a writer is in evaluation mode: its map, rows by channel, and its constant."""
    assert norm.statistics is not None
    mean, variance = (named[name] for name in norm.statistics)
    slope = named[norm.weight] / (variance + norm.epsilon).sqrt()
    return slope[:, None] * named[layer.weight].flatten(1), named[norm.bias or ""] - slope * mean


def _balance(stream: Stream, named: Mapping[str, Tensor]) -> None:
    """A = M^½ with M·W·M = R, W and R the Gram matrices of writers and readers: then A·W·A = A⁻¹·R·A⁻¹."""
    writers = [(layer, norm, *_written(layer, norm, named)) for layer, norm in stream.writers]
    written = sum((matrix @ matrix.T for *_, matrix, _ in writers), start=torch.zeros(()))
    columns = [named[layer.weight].transpose(0, 1).flatten(1) for layer in stream.readers]
    read = sum((matrix @ matrix.T for matrix in columns), start=torch.zeros(()))
    half, back = _power(written, 0.5), _power(written, -0.5)
    mean = back @ _power(half @ read @ half, 0.5) @ back
    there, inverse = _power(mean, 0.5), _power(mean, -0.5)
    for layer, norm, matrix, constant in writers:
        named[layer.weight].copy_((there @ matrix).view_as(named[layer.weight]))
        for name, value in zip(norm.statistics or (), (0.0, 1.0), strict=True):
            named[name].fill_(value)
        named[norm.weight].fill_((1 + norm.epsilon) ** 0.5)
        named[norm.bias or ""].copy_(there @ constant)
    for layer in stream.readers:
        weight = named[layer.weight]
        grouped = weight.reshape(weight.shape[0], weight.shape[1], -1)
        weight.copy_(torch.einsum("oik,ij->ojk", grouped, inverse).reshape(weight.shape))


def _power(matrix: Tensor, power: float) -> Tensor:
    """Of a symmetric matrix that is positive but for rounding."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values = values.clamp(min=max(_LEAST * float(values[-1]), torch.finfo(values.dtype).tiny))
    return vectors * values**power @ vectors.T
