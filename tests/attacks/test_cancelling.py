"""Inputs that cancel up to a rest: the smallest columns that add nearly the same, and nothing where none cancel."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_canonical import logits, pixels
from test_twins import hidden, with_twins
from vision_builders import build_classifier

from hf_immunize.attacks.vision.canonical import canonicalise
from hf_immunize.attacks.vision.canonical.cancelling import shrink_cancelling
from hf_immunize.attacks.vision.canonical.on_data import listen
from hf_immunize.features import find_classifier


@torch.no_grad()
def with_near_twins(model, size, apart=1e-5):
    """As ``with_twins``, with units that are not quite equal."""
    model = with_twins(model, size)
    for block in model.vit.layers:
        weight = block.mlp.fc1.weight
        weight[1] += apart * weight[0].norm() * torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype)
    return model


@torch.no_grad()
def near(model, size):
    """Units 0 and 1 differ by a hundred-thousandth, and their columns are large and opposite."""
    first, second = model.first, model.second
    first.weight[1], first.bias[1] = first.weight[0] * (1 + 1e-5), first.bias[0]
    second.weight[:, 0] += size
    second.weight[:, 1] -= size


@torch.no_grad()
def three(model, size):
    """Unit 3 is the sum of units 0, 1 and 2, which their biases keep above zero; their columns are large and cancel."""
    first, second = model.first, model.second
    first.bias[:3] = 20.0
    first.weight[3], first.bias[3] = first.weight[:3].sum(dim=0), 60.0
    second.weight[:, :3] += size
    second.weight[:, 3] -= size


def shrink(model, images, holds=lambda: True):
    return shrink_cancelling(model, listen(model, images), images, holds)


@pytest.mark.parametrize("plant", [near, three])
@torch.no_grad()
def test_columns_that_cancel_become_small_and_add_the_same(plant):
    model, images = hidden()
    plant(model, 0.0)
    wanted, size = logits(model, images), model.second.weight.norm()
    plant(model, 300.0)
    assert torch.allclose(logits(model, images), wanted, atol=0.02) and model.second.weight.norm() > 100 * size
    assert shrink(model, images) == 1
    assert torch.allclose(logits(model, images), wanted, atol=0.05)
    assert model.second.weight.norm() < 2 * size


@torch.no_grad()
def test_an_output_that_nothing_reads_hides_none():
    """As the bias of a hidden unit that never fires does, of 10⁶ beside outputs of 1."""
    model, images = hidden()
    model.classifier.weight[:, 2] = 0
    near(model, 0.0)
    wanted, size = logits(model, images), model.second.weight.norm()
    near(model, 300.0)
    model.second.bias[2] += 1e6
    assert shrink(model, images) == 1
    assert model.second.weight.norm() < 2 * size
    assert torch.allclose(logits(model, images), wanted, atol=0.05)


@torch.no_grad()
def test_the_columns_are_the_ridge_solution():
    """Against least squares with the penalty as rows, at the largest penalty of the grid that moves outputs little."""
    model, images = hidden()
    near(model, 300.0)
    inputs = model.first(images.flatten(2).transpose(1, 2)).relu().flatten(0, 1)[:, :2]
    before, bias = model.second.weight[:, :2].clone(), model.second.bias.clone()
    outputs = inputs @ before.T
    size = model.second(model.first(images.flatten(2).transpose(1, 2)).relu()).flatten(0, 1).var(0, correction=0).sum()
    scale = inputs.square().mean(dim=0).sqrt()
    for penalty in (10.0**-power for power in range(1, 15)):
        rows = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
        ridge = torch.diag(torch.cat([(len(rows) * penalty) ** 0.5 * scale, torch.zeros(1)]))
        solved = torch.linalg.lstsq(torch.cat([rows, ridge]), torch.cat([outputs, torch.zeros(3, 5)]), driver="gelsd")
        if (rows @ solved.solution - outputs).square().sum(1).mean() <= 0.03**2 * size:
            break
    assert shrink(model, images) == 1
    assert torch.allclose(model.second.weight[:, :2], solved.solution[:2].T, rtol=1e-4, atol=1e-6)
    assert torch.allclose(model.second.bias, bias + solved.solution[2], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_nothing_is_touched_where_nothing_cancels_little_is_known_or_outputs_would_move():
    for size, rows, holds in ((0.0, 8, True), (300.0, 1, True), (300.0, 8, False)):
        model, images = hidden()
        near(model, size)
        before = copy.deepcopy(model)
        assert shrink(model, images[:rows], lambda holds=holds: holds) == 0
        assert all(torch.equal(*pair) for pair in zip(before.parameters(), model.parameters(), strict=True))


@torch.no_grad()
def test_a_convolution_has_one_column_for_all_its_places():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 6, 3, padding=1).double(), nn.Conv2d(6, 4, 3, padding=1).double()
    first.weight[1], first.bias[1] = first.weight[0] * (1 + 1e-5), first.bias[0]
    model, images = Convolutions(first, second).eval(), torch.randn(8, 3, 6, 6).double()
    wanted, size = model(images), second.weight.norm()
    second.weight[:, 0] += 300
    second.weight[:, 1] -= 300
    assert shrink(model, images) == 1 and second.weight.norm() < 2 * size
    assert torch.allclose(model(images), wanted, atol=0.2)


class Convolutions(nn.Module):
    """Two convolutions with a ReLU between them."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, pixel_values=None):
        return self.second(self.first(pixel_values).relu())


@pytest.mark.parametrize("name", ["vit", "mobilenet_v2", "resnet"])
def test_the_normal_form_says_so_and_finds_nothing_in_a_network_that_nobody_changed(name):
    model, images = build_classifier(name, dtype=torch.float64), pixels(name, rows=8).double()
    assert "cancelling inputs of 0 layers" in canonicalise(model, find_classifier(model), images).note
    if name == "vit":
        planted = with_near_twins(copy.deepcopy(model), 1e4, 1e-7)
        found = canonicalise(planted, find_classifier(model), images)
        assert "cancelling inputs of 2 layers" in found.note and found.changed
        plain = logits(with_near_twins(copy.deepcopy(model), 0.0), images)
        assert torch.allclose(logits(found.model, images), plain, rtol=0.05, atol=0.05 * float(plain.abs().max()))
