"""Images and prompts as examples of a pipeline: encoded once, by its own VAE and encoders.

One table says how each class of pipeline reads a prompt, one what it is told of an image's size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    DiTPipeline,
    FluxPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor
from tqdm.auto import tqdm

from hf_immunize.data.fingerprint import digest_pixels
from hf_immunize.diffusion.denoisers import denoiser_of
from hf_immunize.diffusion.examples import LatentDataset, PromptConditions
from hf_immunize.diffusion.pipelines import component_of
from hf_immunize.errors import DataError, ModelError

Told = dict[str, Tensor]


def _one_encoder(pipeline: Any, prompt: str, device: str) -> Told:
    return {"encoder_hidden_states": pipeline.encode_prompt(prompt, device, 1, False)[0]}


def _two_encoders(pipeline: Any, prompt: str, device: str) -> Told:
    states, _, pooled, _ = pipeline.encode_prompt(prompt, device=device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": states, "text_embeds": pooled}


def _three_encoders(pipeline: Any, prompt: str, device: str) -> Told:
    states, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, device=device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def _flux_encoders(pipeline: Any, prompt: str, device: str) -> Told:
    states, pooled, _ = pipeline.encode_prompt(prompt, None, device=device)
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def _masked_encoder(pipeline: Any, prompt: str, device: str) -> Told:
    states, mask, _, _ = pipeline.encode_prompt(prompt, False, device=device)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def _class_name(pipeline: Any, prompt: str, device: str) -> Told:
    known = pipeline.labels
    if prompt not in known and not prompt.isdecimal():
        raise DataError(
            f"expected the name or the number of a class of this pipeline as prompt, got {prompt!r}: names are "
            f"{sorted(known)[:10]} and so on, see pipeline.labels."
        )
    return {"class_labels": torch.tensor([known.get(prompt, int(prompt) if prompt.isdecimal() else 0)], device=device)}


PROMPT_ENCODERS: dict[type, Callable[[Any, str, str], Told]] = {
    StableDiffusionPipeline: _one_encoder,
    StableDiffusionXLPipeline: _two_encoders,
    StableDiffusion3Pipeline: _three_encoders,
    FluxPipeline: _flux_encoders,
    PixArtAlphaPipeline: _masked_encoder,
    PixArtSigmaPipeline: _masked_encoder,
    DiTPipeline: _class_name,
}
"""What a pipeline's encoders make of a prompt: one row, by the denoiser's names; DiT's prompt is a class."""


def _sdxl_size(pipeline: Any, size: int) -> Told:
    # original size, crop and target size (Podell et al. 2023, section 2.2): nothing was cropped away
    return {"time_ids": torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)}


def _pixart_size(pipeline: Any, size: int) -> Told:
    if not pipeline.transformer.use_additional_conditions:
        return {}
    return {"resolution": torch.full((1, 2), float(size)), "aspect_ratio": torch.ones(1, 1)}


SIZE_CONDITIONS: dict[type, Callable[[Any, int], Told]] = {
    StableDiffusionXLPipeline: _sdxl_size,
    PixArtAlphaPipeline: _pixart_size,
    PixArtSigmaPipeline: _pixart_size,
}
"""What a denoiser is told of square images of a side in pixels, where it is told of them."""


def check_pipeline(pipeline: Any) -> None:
    """Raise ModelError for a pipeline class that is not in ``PROMPT_ENCODERS``, or one without a VAE."""
    if type(pipeline) not in PROMPT_ENCODERS or getattr(pipeline, "vae", None) is None:
        known = sorted(kind.__name__ for kind in PROMPT_ENCODERS)
        raise ModelError(f"expected a pipeline among {known} with a VAE, got {type(pipeline).__name__}.")


@torch.no_grad()
def encode_pixels(pipeline: Any, pixels: Tensor) -> Tensor:
    """Latents N×C×H×W float32 of pixels N×3×R×R in −1..1: the mode of the VAE's posterior, shifted and scaled.

    Raises:
        DataError: a resolution the VAE cannot halve often enough.
    """
    vae = pipeline.vae
    size, step = pixels.shape[-1], 2 ** len(vae.config.block_out_channels)  # latents of an even side
    if size % step:
        raise DataError(f"expected images whose side is a multiple of {step}, got {size}: set resolution.")
    config, shift = vae.config, getattr(vae.config, "shift_factor", None) or 0.0
    batches = tqdm(pixels.split(4), desc="encode images", leave=False, disable=None)
    parts = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode().cpu() for part in batches]
    return ((torch.cat(parts) - shift) * config.scaling_factor).float()


@torch.no_grad()
def encode_prompt(pipeline: Any, prompt: str, size: int) -> PromptConditions:
    """Conditions of one row, on the CPU, for a prompt and square images of a side in pixels; known by the prompt.

    Raises:
        ModelError: a pipeline whose tokenizers or encoders are missing or do not fit.

    Encoders keep the dtype of their file, bf16 say; conditions are float32, whatever the run's precision.
    """
    kind = type(pipeline)
    try:
        encoder = getattr(pipeline, "text_encoder", None) or getattr(pipeline, "text_encoder_2", None)
        made = PROMPT_ENCODERS[kind](pipeline, prompt, "cpu" if encoder is None else str(encoder.device))
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, OverflowError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"expected a {kind.__name__} with the tokenizers and text encoders it was published with, got "
            f"{type(error).__name__}: {error}."
        ) from error
    if kind in SIZE_CONDITIONS:
        made |= SIZE_CONDITIONS[kind](pipeline, size)
    told = {name: (value.float() if value.is_floating_point() else value).cpu() for name, value in made.items()}
    return PromptConditions(told, prompt)


def encode(
    pipeline: Any, pixels: Tensor, prompt: str | Sequence[str], label: int | Sequence[int], names: Sequence[str]
) -> LatentDataset:
    """Latents of every image and its prompt's conditions, known by pixels and prompt.

    Prompt and label are those of all images, or one each. Each prompt is encoded once.

    Raises:
        ModelError: see ``check_pipeline``.
        DataError: no prompt, a resolution the VAE cannot halve often enough, a VAE that does not fit the denoiser, or
            an unknown class.
    """
    check_pipeline(pipeline)
    prompts = [prompt] * len(pixels) if isinstance(prompt, str) else list(prompt)
    labels = torch.tensor([label] * len(pixels) if isinstance(label, int) else list(label))
    if empty := [names[label] for text, label in zip(prompts, labels.tolist(), strict=True) if not text.strip()]:
        option = f"{empty[0].split()[0]}_prompt"
        raise DataError(f"expected a prompt for the images of {empty[0]!r}, got none: give {option}.")
    latents, said = encode_pixels(pipeline, pixels), list(dict.fromkeys(prompts))
    told = [encode_prompt(pipeline, text, pixels.shape[-1]) for text in said]
    places = torch.tensor([said.index(text) for text in prompts])
    conditions = {
        # one prompt is held once, however many images it has
        name: value.expand(len(latents), *value.shape[1:]) if len(said) == 1
        else torch.cat([one[name] for one in told])[places]
        for name, value in told[0].items()
    }
    model = getattr(pipeline, component_of(pipeline))
    denoiser_of(model).check(model, latents, conditions)
    known = [
        hashlib.sha256(digest_pixels(row.numpy()) + text.encode()).hexdigest()
        for row, text in zip(pixels, prompts, strict=True)
    ]
    return LatentDataset(latents, conditions, labels, list(names), names[int(labels[0])], digests=known)
