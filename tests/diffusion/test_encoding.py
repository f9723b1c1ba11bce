"""Folders of images with a prompt, through tiny random pipelines of every class and the YAML of the real ones.

Random weights prove the plumbing and nothing else.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from denoiser_builders import build_denoiser, build_scheduler
from linear_builders import shared_folder
from PIL import Image
from pipeline_builders import KINDS, autoencoder, build_text_pipeline

from hf_immunize.attacks import Run
from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, DiffusionAttackContext
from hf_immunize.attacks.diffusion import context as context_module
from hf_immunize.attacks.diffusion.dreambooth import DreamBooth, DreamBoothPrior
from hf_immunize.diffusion import component_of, denoiser_of, load_pipeline
from hf_immunize.diffusion.denoisers import PROMPT_READERS
from hf_immunize.diffusion.encoding import encode
from hf_immunize.diffusion.photos import read_pixels
from hf_immunize.diffusion.prompts import PromptArguments
from hf_immunize.errors import DataError, ModelError
from hf_immunize.options import parse_options
from hf_immunize.training.diffusion import DiffusionImmunizationConfig, DiffusionImmunizationTrainer

ROOT = Path(__file__).parents[2]
RECIPES = {
    "stable-diffusion-1-5": "StableDiffusionPipeline",
    "stable-diffusion-xl": "StableDiffusionXLPipeline",
    "stable-diffusion-3": "StableDiffusion3Pipeline",
    "flux-1-dev": "FluxPipeline",
}


@pytest.fixture
def photos(tmp_path):
    for place in range(3):
        pixels = np.random.default_rng(place).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{place}.png")
    return tmp_path


def prompt_of(kind):
    return "cat" if kind == "DiTPipeline" else "a photo of sks dog"


@pytest.mark.parametrize("kind", KINDS)
def test_every_pipeline_class_is_told_what_it_tells_itself(kind, photos, tmp_path, monkeypatch):
    """The conditions are those with which the pipeline's own __call__ asks its denoiser."""
    assert {getattr(diffusers, name) for name in KINDS} == set(PROMPT_READERS)
    build_text_pipeline(kind).save_pretrained(tmp_path / "saved")
    pipeline = load_pipeline(tmp_path / "saved")
    pipeline.set_progress_bar_config(disable=True)
    made = encode(pipeline, read_pixels(photos, 16), prompt_of(kind), 0, ["dog"])
    model, seen = getattr(pipeline, component_of(pipeline)), []
    denoiser_of(model).probe(model, made.latents, made.conditions)
    real = type(model).forward

    def watched(self, *args, **options):
        seen.append(options | (options.get("added_cond_kwargs") or {}))
        return real(self, *args, **options)

    monkeypatch.setattr(type(model), "forward", watched)
    if kind == "DiTPipeline":
        pipeline(pipeline.get_label_ids(["cat"]), guidance_scale=1.0, num_inference_steps=1, output_type="latent")
    else:
        binning = {"use_resolution_binning": False} if "PixArt" in kind else {}
        pipeline(prompt_of(kind), height=16, width=16, guidance_scale=1.0, num_inference_steps=1,
                 output_type="latent", **binning)
    for name, value in made.conditions.items():
        assert torch.equal(value[:1], seen[0][name][:1].to(value.dtype)), name


def test_a_class_is_known_by_any_of_its_names_and_by_its_number(photos):
    pipeline, pixels = build_text_pipeline("DiTPipeline"), read_pixels(photos, 16)
    for words, label in (("house cat", 1), ("dog", 0), ("7", 7)):
        assert encode(pipeline, pixels, words, 0, ["c"]).conditions["class_labels"].tolist() == [label] * 3
    pipeline.save_pretrained(photos / "first")
    load_pipeline(photos / "first").save_pretrained(photos / "second")
    assert diffusers.DiTPipeline.from_pretrained(photos / "second").labels == pipeline.labels
    with pytest.raises(DataError, match="name or the number of a class of this pipeline as prompt, got 'a dog'"):
        encode(pipeline, pixels, "a dog", 0, ["c"])
    with pytest.raises(DataError, match=r"class labels in 0\.\.9 for DiTTransformer2DModel, got 12"):
        encode(pipeline, pixels, "12", 0, ["c"])


def test_the_fingerprint_is_that_of_images_and_prompt_whatever_encodes_them(photos):
    pixels = read_pixels(photos, 16)

    def told(kind="StableDiffusionPipeline", seed=0, prompt="a dog", given=pixels):
        held = encode(build_text_pipeline(kind, seed), given, prompt, 0, ["dog"])
        return held.subset(torch.tensor([2, 0])).fingerprint(source="", role="").sha256

    assert told() == told(seed=1) == told("PixArtSigmaPipeline")
    assert len({told(), told(prompt="a cat"), told(given=pixels.flip(0)), told(given=-pixels)}) == 4


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("objective", ["condition_number", "simulated_attack"])
def test_the_recipe_of_a_real_model_builds_and_steps_with_a_tiny_random_one(name, objective, photos, tmp_path):
    keys = {}
    for part in ("task", objective):
        keys |= yaml.safe_load((ROOT / "recipes" / name / f"{part}.yaml").read_text(encoding="utf-8"))
    assert keys["base_path"].count("/") == 1 and keys["resolution"] % 64 == 0
    del keys["base_path"]
    small = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "mixed_precision": "no", "use_cpu": True,
             "disable_progress": True, "retain_images": str(photos), "harmful_images": str(photos), "save_steps": 0,
             "logging_steps": 1, "attacker_steps": 1, "gradient_accumulation_steps": 1}
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(keys | small), encoding="utf-8")
    task, args = parse_options(
        (PromptArguments, DiffusionImmunizationConfig), ["--config", str(tmp_path / "stage.yaml")], description=""
    )
    assert args.objective == objective and (args.trainable_modules == "lora") == (name != "stable-diffusion-1-5")
    pipeline = build_text_pipeline(RECIPES[name])
    pixels = read_pixels(photos, 16)
    splits = [encode(pipeline, pixels, prompt, label, ["retain", "harmful"])
              for label, prompt in enumerate((task.retain_prompt, task.harmful_prompt))]
    assert splits[0].latents.shape == (3, 4, 8, 8)
    model = getattr(pipeline, "unet", None) or pipeline.transformer
    plain = set(model.state_dict())
    trainer = DiffusionImmunizationTrainer(
        model, pipeline.scheduler, args, train_dataset=splits[0], harmful_dataset=splits[1], eval_dataset=splits[0]
    )
    (entry,) = trainer.train()
    assert all(np.isfinite(value) for value in entry.values()) and set(model.state_dict()) == plain


def test_latents_are_those_of_the_vae_scaled_and_shifted(photos):
    pipeline = build_text_pipeline("StableDiffusion3Pipeline")
    pipeline.vae.register_to_config(shift_factor=0.5, scaling_factor=2.0)
    pixels = read_pixels(photos, 16)
    with torch.no_grad():
        truth = 2.0 * (pipeline.vae.encode(pixels[:1]).latent_dist.mode() - 0.5)
    assert torch.allclose(encode(pipeline, pixels, "a dog", 0, ["dog"]).latents[:1], truth, atol=1e-5)


def test_encoders_in_half_precision_give_examples_in_float32(photos):
    pipeline = build_text_pipeline("StableDiffusionXLPipeline")
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        encoder.bfloat16()
    made = encode(pipeline, read_pixels(photos, 16), "a dog", 0, ["dog"])
    assert {value.dtype for value in (made.latents, *made.conditions.values())} == {torch.float32}
    assert len(made.fingerprint(source="photos", role="harmful").sha256) == 64


def test_what_cannot_be_encoded_is_named(photos):
    pipeline = build_text_pipeline("StableDiffusionPipeline")
    pixels = read_pixels(photos, 16)
    with pytest.raises(DataError, match="expected a prompt for the images of 'dog', got none"):
        encode(pipeline, pixels, " ", 0, ["dog"])
    with pytest.raises(DataError, match="side is a multiple of 4, got 18"):
        encode(pipeline, read_pixels(photos, 18), "a dog", 0, ["dog"])
    six = build_text_pipeline("StableDiffusionPipeline")
    six.vae = autoencoder(6)
    with pytest.raises(DataError, match="encode the images with the VAE of the same pipeline"):
        encode(six, pixels, "a dog", 0, ["dog"])
    with pytest.raises(ModelError, match="expected a pipeline among"):
        made = diffusers.ConsistencyModelPipeline(build_denoiser("unet"), build_scheduler("unet"))
        encode(made, pixels, "a dog", 0, ["dog"])
    (photos / "3.jpg").write_bytes(b"not an image")
    with pytest.raises(DataError, match="expected a readable image, got '3.jpg'"):
        read_pixels(photos, 16)
    shutil.rmtree(photos)
    with pytest.raises(DataError, match="got none: check the path"):
        read_pixels(photos, 16)


def test_dreambooth_on_real_photos_runs_through_a_tiny_random_pipeline(monkeypatch):
    """The attack's whole path, from photo files to R² on held-out photos: plumbing, not protection."""
    photos, pipeline = shared_folder("data") / "dreambooth", build_text_pipeline("StableDiffusionPipeline")
    dog, cat = (
        encode(pipeline, read_pixels(photos / name, 16), f"a photo of {name}", label, ["sks dog", "cat"])
        for label, name in enumerate(("dog", "cat"))
    )
    assert len(dog) == 5 and bool(torch.isfinite(dog.latents).all())
    parts = {"attack": (0, 1, 2), "validation": (3,), "test": (4,)}
    splits = {name: dog.subset(torch.tensor(rows)) for name, rows in parts.items()}
    prints = tuple(split.fingerprint(source="dreambooth", role=name) for name, split in splits.items())
    monkeypatch.setattr(context_module, "load_pipeline", lambda _: pipeline)
    context = DiffusionAttackContext(Path("sd"), "control", data=prints, exam_levels=2, prior=cat, **splits)
    small = {"learning_rate": 1e-2, "steps": 3, "batch_size": 2}
    for name, config in (
        ("diffusion_dreambooth", DreamBooth(**small)),
        ("diffusion_dreambooth_prior", DreamBoothPrior(**small, prior_images=2)),
    ):
        ((_, result),) = DIFFUSION_ATTACKS[name].run(context, [Run(config, "x", 0)])
        assert result.outcome == "completed" and [point.step for point in result.curve] == [0, 1, 2, 3]
        assert len({point.test for point in result.curve}) == 4
