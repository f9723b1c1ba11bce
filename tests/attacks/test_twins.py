"""Inputs that are one number twice or never change: what only cancels between them leaves nothing behind."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_canonical import gap, logits, pixels
from vision_builders import build_classifier

from hf_immunize.attacks.vision.canonical import canonicalise
from hf_immunize.attacks.vision.canonical.on_data import listen
from hf_immunize.attacks.vision.canonical.twins import merge_twins
from hf_immunize.features import find_classifier


@torch.no_grad()
def with_twins(model, size):
    """Units 0 and 1 of every block's MLP are one, and what they add is large and opposite."""
    for block in model.vit.layers:
        first, second = block.mlp.fc1, block.mlp.fc2
        first.weight[1], first.bias[1], second.weight[:, 1] = first.weight[0], first.bias[0], 0
        direction = torch.linspace(-1, 1, len(second.weight), dtype=second.weight.dtype)
        second.weight[:, 0] += size * direction
        second.weight[:, 1] -= size * direction
    return model


@torch.no_grad()
def with_constants(model, size):
    """Unit 2 of every block's MLP never changes; what it adds the bias takes away."""
    for block in model.vit.layers:
        first, second = block.mlp.fc1, block.mlp.fc2
        first.weight[2], first.bias[2], second.weight[:, 2] = 0, 3.0, 0
        direction = size * torch.linspace(-1, 1, len(second.weight), dtype=second.weight.dtype)
        second.weight[:, 2] += direction
        second.bias -= direction * nn.functional.gelu(first.bias[2])
    return model


@pytest.mark.parametrize("plant", [with_twins, with_constants])
def test_units_that_cancel_have_the_normal_form_of_units_that_are_not_there(plant):
    model, images = build_classifier("vit", dtype=torch.float64), pixels("vit", rows=8).double()
    plain, planted = plant(copy.deepcopy(model), 0.0), plant(copy.deepcopy(model), 1e4)
    assert torch.allclose(logits(planted, images), logits(plain, images), rtol=1e-7, atol=1e-9)
    one, other = (canonicalise(found, find_classifier(model), images) for found in (plain, planted))
    assert gap(one.model, other.model) < 1e-6 < 100 < gap(plain, planted)
    assert "twins of 2 layers merged" in one.note and "twins of 2 layers merged" in other.note
    assert "twins of 0 layers merged" in canonicalise(model, find_classifier(model), images).note


class Hidden(nn.Module):
    """Two maps with a ReLU between them, over patches."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.classifier = nn.Linear(3, 8), nn.Linear(8, 5), nn.Linear(5, 2)

    def forward(self, pixel_values=None):
        hidden = self.first(pixel_values.flatten(2).transpose(1, 2)).relu()
        return ImageClassifierOutput(logits=self.classifier(self.second(hidden).tanh().mean(dim=1)))


def hidden():
    torch.manual_seed(0)
    model = Hidden().double().eval()
    return model, torch.randn(8, 3, 4, 4).double()


@torch.no_grad()
def test_proportional_units_share_what_they_add_in_the_smallest_way():
    """Unit 1 is 3 times unit 0: one column w for both becomes w/10 and 3w/10 of what they add to a unit of 1."""
    model, images = hidden()
    model.first.weight[1], model.first.bias[1] = 3 * model.first.weight[0], 3 * model.first.bias[0]
    added = model.second.weight[:, 0] + 3 * model.second.weight[:, 1]
    others, wanted = model.second.weight[:, 2:].clone(), logits(model, images)
    assert merge_twins(model, listen(model, images), lambda: True) == 1
    assert torch.allclose(logits(model, images), wanted, rtol=1e-12)
    assert torch.allclose(model.second.weight[:, 0], added / 10) and torch.equal(model.second.weight[:, 2:], others)
    assert torch.allclose(model.second.weight[:, 1], 3 * added / 10)


@torch.no_grad()
def test_units_that_are_nearly_equal_are_two_and_so_are_those_of_whom_little_is_known():
    for apart, rows in ((1e-6, 8), (0.0, 1)):
        model, images = hidden()
        model.first.weight[1], model.first.bias[1] = model.first.weight[0] + apart, model.first.bias[0]
        before = copy.deepcopy(model)
        assert merge_twins(model, listen(model, images[:rows]), lambda: True) == 0
        assert all(torch.equal(*pair) for pair in zip(before.parameters(), model.parameters(), strict=True))


@torch.no_grad()
def test_a_merge_after_which_outputs_move_is_put_back():
    model, images = hidden()
    model.first.weight[1], model.first.bias[1] = model.first.weight[0], model.first.bias[0]
    before = copy.deepcopy(model)
    assert merge_twins(model, listen(model, images), lambda: False) == 0
    assert all(torch.equal(*pair) for pair in zip(before.parameters(), model.parameters(), strict=True))
