"""Linear bottlenecks: any invertible map fits between what writes and what reads them, and none of it is left."""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_canonical import gap, logits, pixels
from vision_builders import build_classifier

from hf_immunize.attacks.vision.canonical import canonicalise
from hf_immunize.attacks.vision.canonical.operations import find_anatomy
from hf_immunize.attacks.vision.canonical.streams import balance_streams, find_streams
from hf_immunize.features import find_classifier


def found(name):
    model, images = build_classifier(name, dtype=torch.float64).eval(), pixels(name, rows=8).double()
    anatomy = find_anatomy(model, images)
    return model, images, anatomy, list(find_streams(anatomy))


def maps(model, stream):
    """What writers do in evaluation mode, and what readers do: rows by channel."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    written = [(named[norm.weight] / (named[norm.statistics[1]] + norm.epsilon).sqrt())[:, None]
               * named[layer.weight].flatten(1) for layer, norm in stream.writers]
    read = [named[layer.weight].transpose(0, 1).flatten(1) for layer in stream.readers]
    return [torch.cat(parts, dim=1).detach() for parts in (written, read)]


@torch.no_grad()
def bend(model, stream, seed, decades=3):
    """A matrix of condition 10^decades into the writers, its inverse into the readers."""
    named, draws = dict(model.named_parameters()) | dict(model.named_buffers()), torch.Generator().manual_seed(seed)
    width = len(stream.writers[0][1].outputs.flatten())
    one, other = (torch.linalg.qr(torch.randn(width, width, generator=draws, dtype=torch.float64))[0] for _ in "ab")
    there = one * torch.logspace(0, -decades, width, dtype=torch.float64) @ other
    for layer, norm in stream.writers:
        mean, variance = (named[name] for name in norm.statistics)
        slope = named[norm.weight] / (variance + norm.epsilon).sqrt()
        constant = there @ (named[norm.bias] - slope * mean)
        weight = named[layer.weight]
        weight.copy_((there @ (slope[:, None] * weight.flatten(1))).view_as(weight))
        mean.zero_(), variance.fill_(1.0), named[norm.weight].fill_((1 + norm.epsilon) ** 0.5)
        named[norm.bias].copy_(constant)
    back = torch.linalg.inv(there)
    for layer in stream.readers:
        weight = named[layer.weight]
        weight.copy_(torch.einsum("oikl,ij->ojkl", weight, back))


@pytest.mark.parametrize("name, count", [("mobilenet_v2", 7), ("efficientnet", 2)])
def test_maps_in_linear_bottlenecks_leave_nothing_behind(name, count):
    """Equal up to a rotation: writers and readers have the singular values they have without the map."""
    model, images, anatomy, streams = found(name)
    assert len(streams) == count
    planted = copy.deepcopy(model)
    for seed, stream in enumerate(streams):
        bend(planted, stream, seed)
    wanted = logits(model, images)
    assert torch.allclose(logits(planted, images), wanted, rtol=1e-6, atol=1e-8) and gap(model, planted) > 0.5
    before = [torch.linalg.svdvals(part) for stream in streams for part in maps(planted, stream)]
    for one in (model, planted):
        holds = lambda one=one: torch.allclose(logits(one, images), wanted, rtol=1e-6, atol=1e-8)  # noqa: E731
        assert balance_streams(find_anatomy(one, images), one, holds) == count
    for stream in streams:
        for one, other in zip(maps(model, stream), maps(planted, stream), strict=True):
            first, second = torch.linalg.svdvals(one), torch.linalg.svdvals(other)
            assert torch.allclose(first, second, rtol=1e-4, atol=1e-5 * float(first.max()))
        written, read = maps(planted, stream)
        assert torch.allclose(written @ written.T, read @ read.T, rtol=1e-5, atol=1e-6 * float((read @ read.T).max()))
    assert max(float(values[0] / values[-1]) for values in before) > 100
    assert canonicalise(planted, find_classifier(model), images).error < 1e-8


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_where_a_rectifier_lies_between_nothing_is_changed(name):
    model, images, anatomy, _ = found(name)
    wanted, kept = logits(model, images), copy.deepcopy(model)
    assert balance_streams(anatomy, model, lambda: torch.allclose(logits(model, images), wanted, rtol=1e-8)) == 0
    assert all(torch.equal(*pair) for pair in zip(model.state_dict().values(), kept.state_dict().values(), strict=True))
