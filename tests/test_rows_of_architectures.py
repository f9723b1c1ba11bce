"""One row per image at the layers of every architecture: against forwards of single images, and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from vision_builders import ARCHITECTURES, HEADS, build_classifier, image_size

from hf_immunize.errors import CaptureError, ModelError
from hf_immunize.features import (
    capture_inputs,
    extract_features,
    find_classifier,
    find_layouts,
    linear_sites,
    unmoved_inputs,
)
from hf_immunize.training.vision.sites import choose_sites

IMAGES = 5


def head_of(name: str, model: nn.Module) -> str:
    return HEADS.get(name) or find_classifier(model)


def lora_sites(name: str, model: nn.Module) -> list[str]:
    """What the preset chooses; nothing where the head is the only linear layer."""
    try:
        return list(choose_sites(model, "lora", None, head_of(name, model), pixels_of(name, 1)[0]))
    except ModelError as error:
        assert "expected linear layers besides the head" in str(error)
        return []


def layers_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def pixels_of(name: str, rows: int = IMAGES) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 3, image_size(name), image_size(name), generator=generator, dtype=torch.float64)


def one_by_one(model: nn.Module, sites: list[str], pixels: Tensor) -> dict[str, Tensor]:
    """Means over everything a layer reads in a forward of one image, whose every entry is that image's."""
    rows: dict[str, list[Tensor]] = {site: [] for site in sites}
    for image in pixels:
        with capture_inputs(model, sites) as caught:
            model(pixel_values=image[None])
        for site in sites:
            value, layer = caught.raw(site), model.get_submodule(site)
            value = value.movedim(1, -1) if isinstance(layer, nn.Conv2d) else value
            assert value.shape[-1] == getattr(layer, "in_features", None) or layer.in_channels
            rows[site].append(value.reshape(-1, value.shape[-1]).mean(dim=0))
    return {site: torch.stack(found) for site, found in rows.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_are_those_of_single_images(name):
    model, pixels = build_classifier(name, dtype=torch.float64), pixels_of(name)
    sites, inputs = layers_of(model), {"pixel_values": pixels[:2]}
    with torch.no_grad(), capture_inputs(model, sites) as caught:
        model(pixel_values=pixels)
    never = [site for site in sites if site not in caught]
    fixed = unmoved_inputs(model, [site for site in sites if site in caught], inputs)
    # Layers whose weights another module reads; tables of positions and learned queries.
    assert (len(never), len(fixed)) == {"siglip": (1, 0), "swinv2": (0, 6), "perceiver": (0, 3)}.get(name, (0, 0))
    for site, why in [*((site, "got none") for site in never[:1]), *((site, "not every image") for site in fixed[:1])]:
        with pytest.raises(CaptureError, match=why):
            find_layouts(model, [site], inputs)
    served = find_layouts(model, [site for site in sites if site not in (*never, *fixed)], inputs)
    assert {head_of(name, model), *lora_sites(name, model)} <= set(served)
    with torch.no_grad():
        truth = one_by_one(model, list(served), pixels)
        with capture_inputs(model, served) as caught:
            model(pixel_values=pixels)
    for site, rows in caught.items():
        assert rows.shape == (IMAGES, truth[site].shape[1])
        assert torch.allclose(rows, truth[site], rtol=1e-9, atol=1e-9 * float(truth[site].abs().max())), site


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gradient_at_a_site_is_that_of_finite_differences(name):
    """Of a term that knows labels, at the head and inside, along one direction of all weights."""
    model, pixels, labels = build_classifier(name, dtype=torch.float64), pixels_of(name, 8), torch.arange(8) % 2
    inside = lora_sites(name, model) or layers_of(model)
    sites = [head_of(name, model), inside[len(inside) // 2]]

    def term(features: Tensor) -> Tensor:
        """Share of the variance that lies between the classes: smooth, and another one when labels are mixed up."""
        centred = features - features.mean(dim=0)
        means = torch.stack([centred[labels == label].mean(dim=0) for label in (0, 1)])
        return means.square().sum() / centred.square().sum()

    with capture_inputs(model, find_layouts(model, sites, {"pixel_values": pixels})) as caught:
        model(pixel_values=pixels)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(weight.shape, generator=generator, dtype=torch.float64) for weight in weights]
    size = torch.cat([change.flatten() for change in direction]).norm()
    direction = [change / size for change in direction]  # a short step: the fewer activations it carries past a kink

    def moved(step: float) -> dict[str, Tensor]:
        with torch.no_grad():
            for weight, change in zip(weights, direction, strict=True):
                weight.add_(step * change)
            return {site: term(rows) for site, rows in one_by_one(model, sites, pixels).items()}

    slopes = {}
    for site in sites:
        rows = caught[site]
        leaf = rows.detach().requires_grad_()
        (at_rows,) = torch.autograd.grad(term(leaf), leaf)
        found = torch.autograd.grad((rows * at_rows).sum(), weights, retain_graph=True, allow_unused=True)
        slopes[site] = sum(
            float((one * change).sum()) for one, change in zip(found, direction, strict=True) if one is not None
        )
    step = 1e-7
    above = moved(step)
    below = moved(-2 * step)
    for site in sites:
        difference = float(above[site] - below[site]) / (2 * step)
        assert slopes[site] == pytest.approx(difference, rel=1e-4, abs=1e-8), site
        assert slopes[site] != 0


@pytest.mark.parametrize("name", ["swin", "swinv2", "convnext", "mobilevit", "focalnet"])
def test_whole_splits_have_a_row_per_image_at_every_automatic_site(name):
    model, pixels = build_classifier(name), pixels_of(name, 7).float()
    sites = [head_of(name, model), *linear_sites(model, "lora", head_of(name, model))]
    batches = [{"pixel_values": part} for part in pixels.split(3)]  # the last batch is one image
    rows = extract_features(model, batches, sites)
    with torch.no_grad():
        truth = one_by_one(model, sites, pixels)
    for site in sites:
        assert rows[site].shape == truth[site].shape and len(rows[site]) == 7
        assert torch.allclose(rows[site], truth[site], rtol=1e-3, atol=1e-5), site
