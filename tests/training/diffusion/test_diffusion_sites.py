"""Sites of denoisers: one row per image, as single images give it, in terms, references and gradients."""

from __future__ import annotations

import pytest
import torch
from denoiser_builders import FAMILIES, build_denoiser, build_examples, build_scheduler
from torch import Tensor, nn

from hf_immunize.diffusion import NoiseProcess, denoiser_of, denoising_losses
from hf_immunize.errors import ConfigError, ModelError
from hf_immunize.features import RowLayout, capture_inputs
from hf_immunize.training.diffusion.references import wrong_target_gradients
from hf_immunize.training.diffusion.sites import choose_layouts, choose_sites
from hf_immunize.training.diffusion.stream import NoisyBatch, NoisyStream

ROWS = 5
REFUSED = {  # called by the output layer as well; one number for all images, unless the conditions hold guidance
    "dit": ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_", "got two or more"),
    "flux": ("time_text_embed.guidance_embedder.linear_", r"of shape \(3, \d+\) for 3 images, which not every image"),
}


def prepared(family: str):
    model = build_denoiser(family, dtype=torch.float64).eval()
    process = NoiseProcess.from_scheduler(build_scheduler(family))
    stream = NoisyStream(build_examples(family, dtype=torch.float64), process, ROWS, seed=0, name="x")
    return denoiser_of(model), model, stream.batch(0, torch.device("cpu"), torch.float64)


def call(denoiser, model: nn.Module, batch: NoisyBatch, rows: slice = slice(None)) -> Tensor:
    conditions = {name: value[rows] for name, value in batch.conditions.items()}
    return denoiser.call(model, batch.noisy[rows], batch.timesteps[rows], conditions)


def one_by_one(denoiser, model: nn.Module, batch: NoisyBatch, sites: list[str]) -> dict[str, Tensor]:
    """Means over everything a layer reads in a forward of one image."""
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    for row in range(ROWS):
        with capture_inputs(model, sites) as caught:
            call(denoiser, model, batch, slice(row, row + 1))
        for site in sites:
            value = caught.raw(site)
            maps = value.dim() == 4 and not isinstance(model.get_submodule(site), nn.Linear)
            value = value.movedim(1, -1) if maps else value
            found[site].append(value.reshape(-1, value.shape[-1]).mean(0))
    return {site: torch.stack(rows) for site, rows in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_single_images(family):
    denoiser, model, batch = prepared(family)
    automatic = choose_sites(denoiser, model, "attention,middle", batch)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    start, why = REFUSED.get(family, ("nothing", ""))
    refused = [name for name in layers if name.startswith(start)]
    assert len(refused) == (2 if family in REFUSED else 0)
    for name in refused:
        with pytest.raises(ModelError, match=why):
            choose_layouts(denoiser, model, [name], None, batch)
    sites = list(dict.fromkeys([*automatic, *(name for name in layers if name not in refused)]))
    served = choose_layouts(denoiser, model, sites, None, batch)
    with torch.no_grad():
        truth = one_by_one(denoiser, model, batch, list(served))
        with capture_inputs(model, served) as caught:
            call(denoiser, model, batch)
    for site, rows in caught.items():
        assert rows.shape == (ROWS, truth[site].shape[1])
        assert torch.allclose(rows, truth[site], rtol=1e-9, atol=1e-9 * float(truth[site].abs().max())), site


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_at_a_site_is_that_of_finite_differences(family):
    """Of a term that knows labels, along one direction of all weights."""
    denoiser, model, batch = prepared(family)
    every = choose_sites(denoiser, model, "attention,middle", batch)
    sites = every[:2] if family == "flux" else every[-2:]  # Flux rounds to float32 where it turns queries and keys
    labels, generator = torch.arange(ROWS) % 2, torch.Generator().manual_seed(2)

    def term(features: Tensor) -> Tensor:
        centred = features - features.mean(0)
        means = torch.stack([centred[labels == label].mean(0) for label in (0, 1)])
        return means.square().sum() / centred.square().sum()

    with capture_inputs(model, choose_layouts(denoiser, model, sites, None, batch)) as caught:
        call(denoiser, model, batch)
    weights = list(model.parameters())
    direction = [torch.randn(weight.shape, generator=generator, dtype=torch.float64) for weight in weights]
    size = torch.cat([change.flatten() for change in direction]).norm()

    def moved(step: float) -> dict[str, float]:
        with torch.no_grad():
            for weight, change in zip(weights, direction, strict=True):
                weight.add_(step * change / size)
            return {site: float(term(rows)) for site, rows in one_by_one(denoiser, model, batch, sites).items()}

    slopes = {}
    for site in sites:
        leaf = caught[site].detach().requires_grad_()
        (at_rows,) = torch.autograd.grad(term(leaf), leaf)
        found = torch.autograd.grad((caught[site] * at_rows).sum(), weights, retain_graph=True, allow_unused=True)
        slopes[site] = sum(
            float((one * change).sum() / size) for one, change in zip(found, direction, strict=True) if one is not None
        )
    above, below = moved(1e-6), moved(-2e-6)
    for site in sites:
        assert slopes[site] == pytest.approx((above[site] - below[site]) / 2e-6, rel=1e-4, abs=1e-8), site
        assert slopes[site] != 0


class Windowed(nn.Module):
    """Four windows of each image under one linear layer, as in Swin; what stands before it is trained."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.out = nn.Conv2d(1, 6, 1), nn.Linear(6, 6), nn.Conv2d(6, 1, 1)

    def forward(self, noisy: Tensor) -> Tensor:
        maps = self.stem(noisy).movedim(1, -1)  # N × 8 × 8 × 6
        windows = maps.unflatten(1, (2, 4)).unflatten(3, (2, 4)).transpose(2, 3).reshape(-1, 16, 6)
        return self.out(self.inner(windows).reshape(len(noisy), 8, 8, 6).movedim(-1, 1))


class Plain:
    """The part of a Denoiser that sites need."""

    @staticmethod
    def call(model, noisy, timesteps, conditions):
        return model(noisy)


def test_the_reference_at_a_site_with_windows_is_of_a_shift_of_all_of_them():
    _, _, batch = prepared("unet")
    torch.manual_seed(0)
    model = Windowed().double()
    layouts = choose_layouts(Plain, model, ["inner"], None, batch)
    assert layouts == {"inner": RowLayout("(n k) t d")}
    norms, _ = wrong_target_gradients(Plain, model, [batch], layouts)
    shift = torch.zeros(ROWS, 6, dtype=torch.float64, requires_grad=True)
    model.inner.register_forward_pre_hook(lambda _, args: (args[0] + shift.repeat_interleave(4, 0)[:, None],))
    denoising_losses(model(batch.noisy), batch.target.roll(1, 0)).mean().backward()
    assert float(norms["inner"]) == pytest.approx(float(shift.grad.norm()), rel=1e-12)


def test_layouts_of_the_users_are_tried_and_wrong_ones_refused():
    denoiser, model, batch = prepared("sd3")
    sites = choose_sites(denoiser, model, "attention", batch)
    name = next(site for site in sites if site.endswith("attn.to_q"))
    told = choose_layouts(denoiser, model, sites, f"{name}=n 0 d", batch)
    assert told[name] == RowLayout("n 0 d")
    with pytest.raises(ModelError, match=r"'\(n k\) d'.*got shape \(3, 16, 16\)"):
        choose_layouts(denoiser, model, sites, f"{name}=(n k) d", batch)
    with pytest.raises(ConfigError, match="expected site_layouts like"):
        choose_layouts(denoiser, model, sites, "nowhere=n t d", batch)
