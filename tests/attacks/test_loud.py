"""What dwarfs the rest of a network and is nothing to its function is nothing to the attacker's steps either."""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_canonical import gap, logits, pixels
from vision_builders import build_classifier

from hf_immunize.attacks.vision.canonical import canonicalise
from hf_immunize.attacks.vision.canonical.loud import CentredLinear
from hf_immunize.features import find_classifier


@torch.no_grad()
def with_unread_unit(model, size):
    """Unit 0 of every block's MLP is large, and nothing reads it; GELU lets no factor pass."""
    for block in model.vit.layers:
        block.mlp.fc2.weight[:, 0] = 0
        block.mlp.fc1.bias[0] = size
    return model


@torch.no_grad()
def with_silent_unit(model, size):
    """Unit 0 of every block's MLP hardly fires, and is read by a huge column."""
    for block in model.vit.layers:
        block.mlp.fc1.weight[0] *= 0.01
        block.mlp.fc1.bias[0] = -7.0
        block.mlp.fc2.weight[:, 0] = size * torch.linspace(-1, 1, len(block.mlp.fc2.weight)).to(block.mlp.fc2.weight)
    return model


@torch.no_grad()
def with_opposite_constants(model, size):
    """The patch bias and the position embeddings, the class token and its position, are large and cancel."""
    there = model.vit.embeddings
    direction = size * torch.linspace(-1, 2, there.position_embeddings.shape[-1]).to(there.position_embeddings)
    there.patch_embeddings.projection.bias += direction
    there.position_embeddings[:, 1:] -= direction
    there.cls_token += direction
    there.position_embeddings[:, :1] -= direction
    return model


def stepped(model, images, classes):
    """How far one step of AdamW at an ordinary rate moves the logits of fresh labels, in units of the largest."""
    model = copy.deepcopy(model).train()
    before = logits(model, images).detach()
    torch.nn.functional.cross_entropy(model(pixel_values=images).logits, torch.arange(len(images)) % classes).backward()
    torch.optim.AdamW(model.parameters(), 1e-3).step()
    return float((logits(model, images).detach() - before).abs().max() / before.abs().max())


def test_a_huge_column_behind_a_unit_that_hardly_fires_sets_no_scale():
    model, images = build_classifier("vit", dtype=torch.float64), pixels("vit", rows=8).double()
    models = [with_silent_unit(copy.deepcopy(model), size) for size in (0.0, 1e6)]
    one, other = (canonicalise(found, find_classifier(model), images) for found in models)
    assert "long columns of 2 dropped" in other.note and gap(*models) > 1e5
    for (name, here), there in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert float(there.norm().detach()) == pytest.approx(float(here.norm().detach()), rel=0.01, abs=1e-6), name


def test_what_is_nothing_to_the_function_is_nothing_to_a_step():
    plant, size, told = with_unread_unit, 2.0**20, "loud inputs of 2 centred"
    model, images = build_classifier("vit", dtype=torch.float64), pixels("vit", rows=8).double()
    harmless = plant(copy.deepcopy(model), 0.0)
    planted = plant(copy.deepcopy(model), size)
    found = canonicalise(planted, find_classifier(model), images)
    assert found.changed and told in found.note
    assert torch.allclose(logits(found.model, images), logits(harmless, images), rtol=1e-3, atol=1e-3)
    usual = stepped(canonicalise(harmless, find_classifier(model), images).model, images, 3)
    assert stepped(planted, images, 3) > 5 * usual
    assert stepped(found.model, images, 3) < 2 * usual


def test_constants_that_cancel_on_one_stream_leave_nothing_behind():
    model, images = build_classifier("vit", dtype=torch.float64), pixels("vit", rows=8).double()
    with torch.no_grad():
        model.vit.embeddings.position_embeddings -= model.vit.embeddings.position_embeddings[:, 1:].mean(dim=1)
    planted = with_opposite_constants(copy.deepcopy(model), 1e5)
    one, other = (canonicalise(found, find_classifier(model), images) for found in (model, planted))
    assert gap(model, planted) > 1e4
    there = other.model.vit.embeddings
    assert max(float(part.detach().abs().max()) for part in (there.position_embeddings, there.cls_token)) < 10
    assert torch.allclose(logits(other.model, images), logits(one.model, images), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "dinov2"])
def test_a_network_that_nobody_changed_has_neither(name):
    model, images = build_classifier(name, dtype=torch.float64), pixels(name, rows=8).double()
    found = canonicalise(model, find_classifier(model), images)
    assert "long columns of 0 dropped, loud inputs of 0 centred" in found.note
    assert not any(isinstance(module, CentredLinear) for module in found.model.modules())
