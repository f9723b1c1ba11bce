"""What hides from whoever looks at weights alone: statistics that no data have, weights that nothing excites."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_canonical import gap, logits, pixels
from vision_builders import build_classifier

from hf_immunize.attacks.vision import canonical
from hf_immunize.attacks.vision.canonical import canonicalise
from hf_immunize.attacks.vision.canonical.on_data import listen, refit_statistics, silence_unheard
from hf_immunize.features import find_classifier


def normal_form(model, images):
    found = canonicalise(model, find_classifier(model), images)
    assert found.changed, found.note
    return found.model


@torch.no_grad()
def lie(model):
    """Running variances × c², gains × c: the same in evaluation mode, another network by the statistics of batches."""
    draws = torch.Generator().manual_seed(3)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            scale = (2 * torch.randn(norm.weight.shape, generator=draws, dtype=torch.float64)).exp().to(norm.weight)
            before = norm.running_var + norm.eps
            norm.running_var.copy_(before * scale.square() - norm.eps)
            norm.weight.mul_(scale)


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "efficientnet"])
def test_statistics_that_no_data_have_leave_nothing_behind(name):
    model, images = build_classifier(name, dtype=torch.float64), pixels(name, rows=12).double()
    planted = copy.deepcopy(model)
    lie(planted)
    assert torch.allclose(logits(planted, images), logits(model, images), rtol=1e-6, atol=1e-9)
    assert gap(model, planted) > 1
    one, other = normal_form(model, images), normal_form(planted, images)
    assert gap(one, other) < 1e-6
    for norm in (part for found in (one, other) for part in found.modules() if isinstance(part, _BatchNorm)):
        norm.train()
    assert torch.allclose(logits(one, images), logits(other, images), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2"])
def test_refitted_statistics_are_those_of_the_images_and_the_function_stays(name):
    model, images = build_classifier(name, dtype=torch.float64).eval(), pixels(name, rows=20).double()
    lie(model)
    wanted, seen = logits(model, images), {}
    assert refit_statistics(model, images) == sum(isinstance(part, _BatchNorm) for part in model.modules())
    assert torch.allclose(logits(model, images), wanted, rtol=1e-9, atol=1e-9)
    hooks = [part.register_forward_pre_hook(lambda part, given: seen.setdefault(part, given[0]))
             for part in model.modules() if isinstance(part, _BatchNorm)]
    logits(model, images)
    for hook in hooks:
        hook.remove()
    for norm, values in seen.items():
        variance = values.var(dim=(0, 2, 3), unbiased=False)
        varies = variance > 1e-12
        assert torch.allclose(norm.running_var[varies], variance[varies], rtol=1e-8)
        assert torch.allclose(norm.running_mean[varies], values.mean(dim=(0, 2, 3))[varies], atol=1e-9)


@torch.no_grad()
def with_a_dead_unit(model, size):
    """One more hidden unit in every block, which never fires, and whose column is huge: the same answers."""
    config = copy.deepcopy(model.config)
    config.intermediate_size += 1
    made, dead = type(model)(config).to(torch.float64).eval(), config.intermediate_size - 1
    held = made.state_dict()
    for name, value in model.state_dict().items():
        held[name].zero_()[tuple(slice(0, length) for length in value.shape)] = value
    made.load_state_dict(held)
    for value in made.parameters():
        if value.shape == (config.intermediate_size,):
            value[dead] = -100.0
        elif value.dim() == 2 and value.shape[1] == config.intermediate_size:
            value[:, dead] = size
    return made


@pytest.mark.parametrize("size", [1e6, 1e30])
def test_a_huge_column_behind_a_unit_that_never_fires_sets_no_scale(size):
    model, images = build_classifier("vit", dtype=torch.float64).eval(), pixels("vit", rows=8).double()
    planted = with_a_dead_unit(model, size)
    assert torch.allclose(logits(planted, images), logits(model, images), rtol=1e-12)
    one, other = normal_form(model, images), normal_form(planted, images)
    live = dict(other.named_parameters())
    for name, value in one.named_parameters():
        part = live[name][tuple(slice(0, length) for length in value.shape)]
        assert torch.allclose(part, value, rtol=1e-6, atol=1e-6 * float(value.abs().max())), name
    assert torch.isfinite(logits(normal_form(planted.float(), images.float()), images.float())).all()


def test_weights_that_read_a_colour_no_image_has_are_silenced_and_others_are_not():
    model, images = build_classifier("vit", dtype=torch.float64).eval(), pixels("vit", rows=8).double()
    images[:, 2] = 0
    patches = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
    before = patches.weight.detach().clone()
    with torch.no_grad():
        patches.weight[:, 2] = 1e6
    wanted = logits(model, images)
    assert silence_unheard(listen(model, images)) == 1
    assert torch.equal(patches.weight[:, 2], torch.zeros_like(before[:, 2]))
    assert torch.equal(patches.weight[:, :2], before[:, :2]) and torch.equal(logits(model, images), wanted)


def test_a_normal_form_that_is_lost_in_the_models_own_precision_is_not_used(monkeypatch):
    model, images = build_classifier("vit"), pixels("vit")
    written = canonical._written

    def broken(*models):
        made = written(*models)
        with torch.no_grad():
            next(made.parameters()).fill_(float("nan"))
        return made

    monkeypatch.setattr(canonical, "_written", broken)
    found = canonicalise(model, find_classifier(model), images)
    assert not found.changed and "in the model's own precision" in found.note
