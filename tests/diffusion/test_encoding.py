"""Folders of images with a prompt, through tiny random pipelines of every class and the YAML of the real ones.

Random weights prove the plumbing and nothing else; the text encoders are stood in for by tensors of their shapes.
"""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from denoiser_builders import FAMILIES, build_denoiser, build_scheduler
from linear_builders import shared_folder
from PIL import Image

from hf_immunize.attacks import Run
from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, DiffusionAttackContext
from hf_immunize.attacks.diffusion import context as context_module
from hf_immunize.attacks.diffusion.dreambooth import DreamBooth, DreamBoothPrior
from hf_immunize.diffusion.encoding import PROMPT_ENCODERS, PromptArguments, encode, read_pixels
from hf_immunize.errors import DataError, ModelError
from hf_immunize.options import parse_options
from hf_immunize.training.diffusion import DiffusionImmunizationConfig, DiffusionImmunizationTrainer

ROOT = Path(__file__).parents[2]
RECIPES = {
    "stable-diffusion-1-5": ("StableDiffusionPipeline", "sd"),
    "stable-diffusion-xl": ("StableDiffusionXLPipeline", "sdxl"),
    "stable-diffusion-3": ("StableDiffusion3Pipeline", "sd3"),
    "flux-1-dev": ("FluxPipeline", "flux"),
}


def autoencoder(channels: int = 4) -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8), latent_channels=channels, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()


def build_pipeline(kind: str, family: str, channels: int = 4):
    """A pipeline of the real class; its ``encode_prompt`` checks the call against the real one's signature."""
    real = getattr(diffusers, kind)
    wanted = set(inspect.signature(real.__init__).parameters) - {"self"}
    parts = {name: None for name in wanted if name.startswith(("text_encoder", "tokenizer"))}
    parts |= {name: None for name in ("image_encoder", "feature_extractor", "safety_checker") if name in wanted}
    name = "unet" if "UNet" in FAMILIES[family][0] else "transformer"
    parts |= {name: build_denoiser(family), "vae": autoencoder(channels), "scheduler": build_scheduler(family)}
    if "requires_safety_checker" in wanted:
        parts["requires_safety_checker"] = False
    pipeline = real(**parts)
    states = torch.randn(1, *FAMILIES[family][3]["encoder_hidden_states"])
    pooled = torch.randn(1, 10)
    answers = {
        "sd": (states, None), "sdxl": (states, None, pooled, None), "sd3": (states, None, pooled, None),
        "flux": (states, pooled, None),
    }

    def encode_prompt(*args, **options):
        inspect.signature(real.encode_prompt).bind(pipeline, *args, **options)
        return answers[family]

    pipeline.encode_prompt = encode_prompt
    return pipeline


@pytest.fixture
def photos(tmp_path):
    for place in range(3):
        pixels = np.random.default_rng(place).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{place}.png")
    return tmp_path


def test_every_pipeline_class_has_a_recipe():
    assert {getattr(diffusers, kind) for kind, _ in RECIPES.values()} == set(PROMPT_ENCODERS)


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("objective", ["condition_number", "simulated_attack"])
def test_the_recipe_of_a_real_model_builds_and_steps_with_a_tiny_random_one(name, objective, photos, tmp_path):
    path = ROOT / "recipes" / name / f"{objective}.yaml"
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert keys["base_path"].count("/") == 1 and keys["resolution"] % 64 == 0
    del keys["base_path"]
    small = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "mixed_precision": "no", "use_cpu": True,
             "disable_progress": True, "retain_images": str(photos), "harmful_images": str(photos), "save_steps": 0,
             "logging_steps": 1, "attacker_steps": 1, "gradient_accumulation_steps": 1}
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(keys | small), encoding="utf-8")
    task, args = parse_options(
        (PromptArguments, DiffusionImmunizationConfig), ["--config", str(tmp_path / "stage.yaml")], description=""
    )
    assert args.objective == objective and (args.trainable == "lora") == (name != "stable-diffusion-1-5")
    pipeline = build_pipeline(*RECIPES[name])
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
    pipeline = build_pipeline("StableDiffusion3Pipeline", "sd3")
    pipeline.vae.register_to_config(shift_factor=0.5, scaling_factor=2.0)
    pixels = read_pixels(photos, 16)
    with torch.no_grad():
        truth = 2.0 * (pipeline.vae.encode(pixels[:1]).latent_dist.mode() - 0.5)
    assert torch.allclose(encode(pipeline, pixels, "a dog", 0, ["dog"]).latents[:1], truth, atol=1e-5)


def test_encoders_in_half_precision_give_examples_in_float32(photos):
    pipeline = build_pipeline("StableDiffusionXLPipeline", "sdxl")
    answer = [part if part is None else part.bfloat16() for part in pipeline.encode_prompt(
        "a dog", device="cpu", do_classifier_free_guidance=False)]
    pipeline.encode_prompt = lambda *args, **options: answer
    made = encode(pipeline, read_pixels(photos, 16), "a dog", 0, ["dog"])
    assert {value.dtype for value in (made.latents, *made.conditions.values())} == {torch.float32}
    assert len(made.fingerprint(source="photos", role="harmful").sha256) == 64


def test_what_cannot_be_encoded_is_named(photos):
    pipeline = build_pipeline("StableDiffusionPipeline", "sd")
    pixels = read_pixels(photos, 16)
    with pytest.raises(DataError, match="expected a prompt for the images of 'dog', got none"):
        encode(pipeline, pixels, " ", 0, ["dog"])
    with pytest.raises(DataError, match="side is a multiple of 4, got 18"):
        encode(pipeline, read_pixels(photos, 18), "a dog", 0, ["dog"])
    with pytest.raises(DataError, match="encode the images with the VAE of the same pipeline"):
        encode(build_pipeline("StableDiffusionPipeline", "sd", channels=6), pixels, "a dog", 0, ["dog"])
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
    photos, pipeline = shared_folder("data") / "dreambooth", build_pipeline("StableDiffusionPipeline", "sd")
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
