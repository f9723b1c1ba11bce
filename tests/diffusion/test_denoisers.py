"""Every family is called as its own pipeline calls it."""

from __future__ import annotations

import diffusers
import pytest
import torch
from denoiser_builders import FAMILIES, build_denoiser, build_examples

from hf_immunize.diffusion import DENOISERS, denoiser_of, fits_memory
from hf_immunize.diffusion.families.flux import pack_patches, patch_places, unpack_patches
from hf_immunize.errors import DataError, DeviceMemoryError, ModelError


def answer_of(model, batch, timesteps=None):
    told = torch.full((len(batch),), 500) if timesteps is None else timesteps
    return denoiser_of(model).call(model, batch.latents, told, batch.conditions)


def test_every_class_of_the_table_is_tried():
    assert {getattr(diffusers, kind) for kind, *_ in FAMILIES.values()} == set(DENOISERS)


def test_the_answer_has_the_shape_of_the_latents_and_uses_everything_it_needs(family):
    model = build_denoiser(family).eval()
    examples = build_examples(family, rows=3)
    batch = examples.batch(torch.arange(3))
    denoiser_of(model).check(model, examples.latents, examples.conditions)
    with torch.no_grad():
        answer = answer_of(model, batch)
        assert answer.shape == batch.latents.shape and bool(torch.isfinite(answer).all())
        assert not torch.allclose(answer, answer_of(model, batch, torch.full((3,), 20)))
        for name in denoiser_of(model).needs(model):
            other = dict(batch.conditions)
            other[name] = (other[name] + 1) % 10 if name == "class_labels" else other[name] + 1
            changed = denoiser_of(model).call(model, batch.latents, torch.full((3,), 500), other)
            assert not torch.allclose(answer, changed), name


def test_missing_conditions_and_wrong_latents_are_named(family):
    model, examples = build_denoiser(family), build_examples(family, rows=2)
    denoiser = denoiser_of(model)
    with pytest.raises(DataError, match="encode the images with the VAE"):
        denoiser.check(model, torch.zeros(2, 7, 8, 8), examples.conditions)
    with pytest.raises(DataError, match=f"got none for .*{denoiser.needs(model)[-1]}"):
        denoiser.check(model, examples.latents, {})


def test_labels_without_an_embedding_and_answers_of_another_size_are_named():
    for family in ("unet", "dit"):
        model, examples = build_denoiser(family).train(), build_examples(family, rows=2)
        for label in (10, -1):
            with pytest.raises(DataError, match=r"expected class labels in 0\.\.9"):
                denoiser_of(model).check(model, examples.latents, {"class_labels": torch.tensor([0, label])})
        denoiser_of(model).probe(model, examples.latents, examples.conditions)
        assert model.training
    with pytest.raises(DataError, match=r"in the shape of the latents, \(4, 7, 7\), got \(4, 6, 6\)"):
        denoiser_of(model).probe(model, torch.zeros(2, 4, 7, 7), examples.conditions)


def test_memory_that_is_short_is_told_apart_from_other_errors():
    for error in (torch.OutOfMemoryError("CUDA"), MemoryError("numpy"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")):
        with pytest.raises(DeviceMemoryError, match="expected a sheet to fit the memory, got .*: buy more"):
            with fits_memory("a sheet", "buy more"):
                raise error
    with pytest.raises(RuntimeError, match="^shapes$"), fits_memory("a sheet", "buy more"):
        raise RuntimeError("shapes")


def test_an_unknown_class_is_named():
    with pytest.raises(ModelError, match="got Linear: add an entry"):
        denoiser_of(torch.nn.Linear(2, 2))


def test_flux_is_packed_as_its_pipeline_packs():
    latents = torch.randn(2, 4, 6, 8)
    pipeline = diffusers.FluxPipeline
    assert torch.equal(pack_patches(latents), pipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpack_patches(pack_patches(latents), 6, 8), latents)
    truth = pipeline._prepare_latent_image_ids(1, 3, 4, "cpu", torch.float32)
    assert torch.equal(patch_places(3, 4).float(), truth)


def test_the_middle_and_the_attention_projections_exist(family):
    model = build_denoiser(family)
    entry = denoiser_of(model)
    model.get_submodule(entry.middle(model))
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for part in entry.attention:
        assert any(name.endswith(f".{part}") for name in names), part
